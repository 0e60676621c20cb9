"""How Sphinx builds these pages: ``make docs``, where every warning is an error."""

import inspect
import re
import shutil
from pathlib import Path

from docutils import nodes
from docutils.utils.math.latex2mathml import tex2mathml
from sphinx.application import Sphinx
from sphinx.environment import BuildEnvironment
from sphinx.util import logging

import pyro_elbo_ext

ROOT = Path(__file__).parents[1]

# What users subclass or follow to add something of their own, and what that is handed.
EXTENSION_POINTS = (
    "pyro_elbo_ext.Bound",
    "pyro_elbo_ext.Callback",
    "pyro_elbo_ext.Decision",
    "pyro_elbo_ext.Gradient",
    "pyro_elbo_ext.StoppingRule",
    "pyro_elbo_ext.bounds.Path",
    "pyro_elbo_ext.bounds.Weights",
)

project = "pyro_elbo_ext"
author = copyright = "the authors of pyro_elbo_ext"
release = version = pyro_elbo_ext.__version__

extensions = [
    "sphinx.ext.autodoc",
    "sphinx.ext.autosummary",
    "sphinx.ext.viewcode",
    "numpydoc",
    "myst_nb",
    "sphinx_copybutton",
]
exclude_patterns = ["_build", "**/.ipynb_checkpoints"]
templates_path = ["_templates"]

# The notebooks are stored executed: `python tests/run_tutorials.py tutorials` runs them, not the build.
nb_execution_mode = "off"
myst_enable_extensions = ["colon_fence", "deflist", "dollarmath"]
myst_heading_anchors = 3

autosummary_generate = True
autosummary_ignore_module_all = False
autodoc_typehints = "none"  # the docstrings give types and shapes
autodoc_member_order = "bysource"
numpydoc_show_class_members = False
numpydoc_class_members_toctree = False

# A reference to a name of ours that leads nowhere is an error. Other projects are not asked: it takes a network.
nitpicky = True
nitpick_ignore_regex = [("py:.*", r"(?!pyro_elbo_ext).*")]

html_theme = "pydata_sphinx_theme"  # as ArviZ's; PyMC's is built on it
html_title = "pyro_elbo_ext"
html_static_path = ["_static"]
html_favicon = "_static/icon.svg"
html_context = {"default_mode": "auto"}  # light or dark, as the reader's browser
html_css_files = ["pages.css"]
html_show_sourcelink = False
html_copy_source = False
html_theme_options = {
    "navbar_align": "left",
    "navigation_with_keys": False,
    "show_prev_next": True,
    "secondary_sidebar_items": ["page-toc"],
    "footer_start": ["copyright"],
    "footer_end": [],
}
html_math_renderer = "mathml"  # by docutils: no script from another server


def _mathml(translator, node, *, block: bool) -> None:
    tex = re.sub(r"\\texttt{(.*?)}", lambda text: rf"\text{{{text[1]}}}".replace(r"\_", "_"), node.astext().strip())
    mathml = tex2mathml(tex, as_block=block)
    translator.body.append(f'<div class="math">{mathml}</div>' if block else mathml)
    raise nodes.SkipNode


def copy_tutorials(app: Sphinx) -> None:
    """Put the notebooks where Sphinx looks; links between them work in both places."""
    for notebook in sorted(ROOT.glob("tutorials/*.ipynb")):
        shutil.copy2(notebook, ROOT / "docs" / "tutorials")


def check_reference(app: Sphinx, env: BuildEnvironment) -> None:
    """Warn, and so fail, where a public name or an extension point stands on no page of the reference."""
    documented = env.domains["py"].objects
    for name in (*(f"pyro_elbo_ext.{name}" for name in pyro_elbo_ext.__all__), *EXTENSION_POINTS):
        if name not in documented:
            logging.getLogger(__name__).warning("%s is public and stands on no page of docs/reference", name)


def check_docstring(app: Sphinx, what: str, name: str, obj: object, options: object, lines: list[str]) -> None:
    """Warn where something that the reference shows has no docstring of its own or inherited."""
    if what in ("class", "function", "method", "property") and not inspect.getdoc(obj):
        logging.getLogger(__name__).warning("%s has no docstring", name)


def setup(app: Sphinx) -> None:
    app.add_html_math_renderer(
        "mathml",
        inline_renderers=(lambda self, node: _mathml(self, node, block=False), None),
        block_renderers=(lambda self, node: _mathml(self, node, block=True), None),
    )
    app.connect("builder-inited", copy_tutorials)
    app.connect("autodoc-process-docstring", check_docstring)
    app.connect("env-check-consistency", check_reference)
