"""Finds in a file's syntax tree what runs code that came as data."""

import ast

# Unpickle, or are there to run code.
MODULES = frozenset(
  ['pickle', '_pickle', 'cPickle', 'dill', 'cloudpickle', 'joblib', 'shelve']
  + ['marshal', 'multiprocessing', 'torch', 'builtins', 'code', 'codeop']
  + ['imp', 'runpy', 'zipimport']
)
BUILT_IN = frozenset(['eval', 'exec', 'compile', '__import__', '__builtins__'])
CALLS = frozenset(
  [
    'os.system',
    'os.popen',
    'subprocess.getoutput',
    'subprocess.getstatusoutput',
  ]
  + ['pandas.read_pickle', 'pandas.read_hdf', 'pandas.HDFStore', 'pandas.eval']
  + ['numpy.fromregex', 'numpy.lib.format.read_array', 'jinja2.Template']
  + ['jinja2.Environment', 'sympy.sympify', 'sympy.parse_expr']
  + ['concurrent.futures.ProcessPoolExecutor']
  + ['importlib.util.spec_from_file_location', 'importlib.reload']
  + ['importlib.machinery.SourceFileLoader']
)
# Of `yaml` only this reads data alone.
_YAML = ('yaml.safe_load', 'yaml.safe_dump', 'yaml.dump')
# Keywords that have to be a literal False.
KEYWORDS = frozenset(['trust_remote_code', 'allow_pickle', 'shell'])


def find(tree: ast.AST) -> list[tuple[int, str]]:
  """(line, what) of everything that is forbidden."""
  names = _imported(tree)
  found = []
  for node in ast.walk(tree):
    for what in _forbidden(node, names):
      found.append((node.lineno, what))
  return sorted(found)


def _imported(tree: ast.AST) -> dict[str, str]:
  """What the names that imports bind stand for."""
  names = {}
  for node in ast.walk(tree):
    if isinstance(node, ast.Import):
      for alias in node.names:
        short = alias.asname or alias.name.partition('.')[0]
        names[short] = alias.name if alias.asname else short
    elif isinstance(node, ast.ImportFrom):
      for alias in node.names:
        names[alias.asname or alias.name] = f'{node.module}.{alias.name}'
  return names


def _forbidden(node: ast.AST, names: dict[str, str]) -> list[str]:
  if isinstance(node, ast.Import):
    modules = {alias.name.partition('.')[0] for alias in node.names}
    return sorted(modules & MODULES)
  if isinstance(node, ast.ImportFrom):
    module = (node.module or '').partition('.')[0]
    whole = [f'{node.module}.{alias.name}' for alias in node.names]
    known = [name for name in whole if name in CALLS]
    return [module] if module in MODULES else known
  if isinstance(node, ast.Name) and node.id in BUILT_IN:
    return [node.id]
  if isinstance(node, ast.Attribute):
    return _forbidden_attribute(_dotted(node, names), node)
  return _forbidden_call(node, names) if isinstance(node, ast.Call) else []


def _forbidden_attribute(dotted: str, node: ast.Attribute) -> list[str]:
  if dotted in CALLS or dotted == 'torch.load':
    return [dotted]
  if dotted.startswith(('os.exec', 'os.spawn', 'os.posix_spawn')):
    return [dotted]
  if dotted.startswith('yaml.') and dotted not in _YAML:
    return [dotted]
  own = node.attr in ('exec_module', 'load_module', '__import__')
  return [node.attr] if own else []


def _forbidden_call(node: ast.Call, names: dict[str, str]) -> list[str]:
  found, called = [], _dotted(node.func, names)
  given = {keyword.arg: keyword.value for keyword in node.keywords}
  for name in KEYWORDS & given.keys():
    if getattr(given[name], 'value', None) is not False:
      found.append(name)
  # What its default is has changed before.
  if called == 'numpy.load' and 'allow_pickle' not in given:
    found.append('numpy.load')
  computed = not node.args or not isinstance(node.args[0], ast.Constant)
  if called == 'importlib.import_module' and computed:
    found.append(called)
  return found


def _dotted(node: ast.AST, names: dict[str, str]) -> str:
  """`np.load` → 'numpy.load'; '' for what is no dotted name."""
  if isinstance(node, ast.Name):
    return names.get(node.id, node.id)
  if isinstance(node, ast.Attribute):
    inner = _dotted(node.value, names)
    return f'{inner}.{node.attr}' if inner else ''
  return ''
