"""Python imports this module at the start of each process below `python -m hf_flashmask run`.

It imports hf_flashmask, and so registers the implementation, once Transformers is there and complete. It needs nothing
but the standard library: most processes never import Transformers, and must not pay for it.
"""

import importlib.machinery
import importlib.util
import sys
from pathlib import Path


class _AfterTransformers:
    """Finds the modules of Transformers as others do, and looks at each of them once it has run."""

    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] != "transformers":
            return None
        others = (finder.find_spec(name, path, target) for finder in sys.meta_path if finder is not self)
        spec = next(filter(None, others), None)
        if spec is not None and hasattr(spec.loader, "exec_module"):
            execute = spec.loader.exec_module

            def execute_and_look(module):
                execute(module)
                self.look(name)

            spec.loader.exec_module = execute_and_look
        return spec

    def look(self, name):
        if "transformers.modeling_utils" not in sys.modules or self not in sys.meta_path:
            return
        # Modules that are still being imported lack names that hf_flashmask imports.
        if any(_is_being_imported(module) for other, module in list(sys.modules.items()) if other != name):
            return
        sys.meta_path.remove(self)
        try:
            import hf_flashmask  # noqa: F401
        except ImportError as error:
            print(
                f"hf_flashmask cannot be imported in {sys.executable}, so that it is not registered: {error}",
                file=sys.stderr,
            )


def _is_being_imported(module):
    name = getattr(module, "__name__", "")
    return name.startswith("transformers.") and getattr(getattr(module, "__spec__", None), "_initializing", False)


def _run_the_next_sitecustomize():
    """There may be one of the system, which this one hides."""
    folder = str(Path(__file__).parent)
    spec = importlib.machinery.PathFinder.find_spec("sitecustomize", [path for path in sys.path if path != folder])
    if spec is not None and spec.loader is not None:
        spec.loader.exec_module(importlib.util.module_from_spec(spec))


sys.meta_path.insert(0, _AfterTransformers())
_run_the_next_sitecustomize()
