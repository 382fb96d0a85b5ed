"""The same job in other libraries, each in an environment of its own.

`benchmarks.compare_peers` starts these scripts; nothing of `jaxrl_llm` is
imported here.
"""
