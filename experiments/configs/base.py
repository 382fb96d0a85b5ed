"""Defaults of all configuration fields.

A configuration starts with `config = base.get_config()` and changes fields.
"""

from ml_collections import ConfigDict


def optimizer(learning_rate: float, **changes) -> ConfigDict:
  """Builds arguments of `training.schedule` and `training.adamw`."""
  return ConfigDict(
    dict(
      learning_rate=learning_rate,
      warmup_updates=0,
      # 'constant', 'linear' or 'cosine'; the last two decay to 0.
      decay='constant',
      b1=0.9,
      b2=0.95,
      eps=1e-8,
      weight_decay=0.0,
      max_grad_norm=1.0,
    )
    | changes
  )


def get_config() -> ConfigDict:
  return ConfigDict(
    dict(
      seed=0,
      steps=100,  # of reinforcement learning, after the warm start
      # RL ends after the step in which its generated tokens (greedy baselines
      # and branches included) reach this number; 0: by steps alone.
      tokens=0,
      model=dict(
        # A Hugging Face folder or hub name; '' for a new model, defined by
        # alphabet and architecture.
        path='',
        alphabet='',  # of a new model's character tokenizer
        architecture=ConfigDict(),  # of a new model: fields of ModelConfig
        dtype='float32',  # of matrix products: 'float32' or 'bfloat16'
        param_dtype='float32',
        remat=False,
        unroll=1,  # layers per step of the scan over them
        # Kernel of training and scoring: 'auto', 'xla', 'splash' or 'cudnn'.
        attention='auto',
      ),
      # Devices along the axes of the mesh; one axis may be -1, all remaining
      # devices.  Rows are sharded over data x fsdp, parameters over fsdp
      # (gathered layer by layer) and tensor (docs/scale.md).
      mesh=dict(data=1, fsdp=-1, tensor=1),
      task=ConfigDict(dict(name='')),  # a function of experiments/data.py
      prompts=dict(
        max_tokens=256,
        overlong='error',  # 'error' or 'drop'
        suffix='',
        # 'auto': if the tokenizer has one; '' never.
        chat_template='auto',
        system_prompt='',
        # Data tools (docs/data_tools.md) for the training prompts of RL.
        # File of experiments.label: keeps only prompts whose measured rate
        # is within the bounds, and adds the column pass_rate; '' keeps all.
        pass_rates='',
        min_pass_rate=0.0,
        max_pass_rate=1.0,
        # Easy prompts first: a column of numbers, least first ('-pass_rate':
        # greatest first).  The share of prompts to draw from grows in equal
        # stages, and includes all prompts from step curriculum_steps onward.
        curriculum='',
        curriculum_steps=0,
        curriculum_stages=10,
      ),
      # name → dict(name=function of jaxrl_llm.rewards.functions or .code, or
      # 'file.py:function' or 'module:function', weight=1.0, other arguments of
      # a factory).  With workers=2 samples are scored one by one in 2 processes
      # that can be killed: timeout=5.0, seconds per sample, and memory=2 << 30,
      # bytes per process.
      rewards=ConfigDict(),
      algorithm=ConfigDict(dict(name='')),  # of jaxrl_llm.estimators.algorithms
      rollout=dict(
        prompts=16,  # P, per step
        samples=8,  # G, per prompt
        max_tokens=128,  # T, per response
        allocation='',  # 'independent': common prefixes are decoded once
        temperature=1.0,
        top_k=0,
        top_p=1.0,
        # Data tools (docs/data_tools.md).  Replaces groups whose rewards are
        # all equal by groups of further prompts (DAPO); the maximum number of
        # additional rounds of sampling; 0: never.
        refill=0,
        # A group without a reward above the threshold is sampled again with
        # these shares of its solution's tokens in turn, until a response
        # succeeds (GHPO), such as (0.25, 0.5, 0.75).  prompts.max_tokens limits
        # prompt and hint.  '{prompt}' includes the suffix.
        hints=(),
        hint_threshold=0.0,
        hint_template='{prompt}{hint}',
        # The trainer recomputes log-probabilities if the sampler's differ by
        # more than this at the start, in nats.
        log_prob_tolerance=1e-4,
      ),
      training=dict(
        epochs=1,
        minibatches=1,
        micro_prompts=0,  # prompts per micro-batch; 0 for all of a minibatch
        chunk=256,  # positions whose logits exist at one time
      ),
      # Data of sft, preference, rest_em and reward_model; `train` learns from
      # every step's samples and does not use this section.
      rounds=dict(
        # Sampling steps at the start of a round; 0: learn from the
        # demonstrations or pairs in the task's rows.
        sampling=0,
        learning=0,  # updates after the sampling steps
        batch=64,  # demonstrations, responses or pairs per update
        per_prompt=4,  # most responses or pairs of one prompt in a round
      ),
      optimizer=optimizer(1e-5),
      critic=dict(  # for algorithms with a critic
        # 'separate', or 'shared': a value head on the policy's trunk.
        trunk='separate',
        # Initial parameters of a separate trunk: a Hugging Face folder or hub
        # name of a language model, or of a reward model including its head (the
        # layout *ForSequenceClassification); '' for a copy of the policy.
        path='',
        warmup=0,  # steps in which only the critic learns
        optimizer=optimizer(1e-4),
      ),
      warm_start=dict(
        steps=0,  # of supervised learning on the task's demonstrations
        batch=64,  # demonstrations per step
        optimizer=optimizer(1e-3),
      ),
      evaluation=dict(
        every=20,  # steps
        every_tokens=0,  # generated tokens, in addition; 0: by steps alone
        prompts=256,  # held-out prompts; 0 for all
        batch=256,  # prompts at one time
        samples=1,
        temperature=0.0,
      ),
      checkpoints=dict(every=50, keep_latest=2, keep_best=1),
      log=dict(
        samples=4,  # responses written to samples.jsonl per step
        table=6,  # held-out prompts in the before/after table
      ),
    )
  )
