"""Sphinx's settings: pages in Markdown, the reference from docstrings as they stand in the sources, formulas as MathML.

    make docs

Nothing here needs the network, neither when the site is built nor when it is read.
"""

import sys
import tomllib
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "docs" / "_site"))

_about = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]

project = "nhwconv"
author = "The nhwconv developers"
copyright = f"2026, {author}"
version = release = (ROOT / "src/nhwconv/_version.py").read_text(encoding="utf-8").rsplit('"', 2)[1]
#: Where files that are no pages are shown.
repository_url = _about["urls"]["Repository"]

extensions = ["autoapi.extension", "myst_parser", "sphinx.ext.napoleon", "sphinx_copybutton", "mathml", "repository"]
exclude_patterns = ["_site", "_static"]

# Pages.
source_suffix = {".md": "markdown"}
myst_enable_extensions = ["dollarmath"]
myst_fence_as_directive = ["math"]  # as the repository's own viewer has it
myst_heading_anchors = 3
html_math_renderer = "mathml"

# The reference. Sources are parsed: the site needs neither Numba nor PyTorch, JAX or Dask.
autoapi_dirs = ["../src/nhwconv"]
# What is imported inside of functions, or from packages without sources, it cannot follow.
suppress_warnings = ["autoapi.python_import_resolution"]
autoapi_generate_api_docs = False
autosummary_generate = False  # autoapi brings it; pages are Markdown
autoapi_python_class_content = "class"
autodoc_typehints = "none"  # types stand in the docstrings, with shapes
napoleon_google_docstring = False
napoleon_use_rtype = False
napoleon_use_ivar = True
napoleon_preprocess_types = False
default_role = "py:obj"  # `conv2d` is a link where there is such a thing

# What it looks like.
html_theme = "furo"
html_title = f"nhwconv {release}"
html_favicon = "_static/icon.svg"
html_static_path = ["_static"]
html_css_files = ["site.css"]
html_copy_source = False
html_show_sphinx = False
html_theme_options = {
    "source_repository": repository_url,
    "source_branch": "main",
    "source_directory": "docs/",
    "light_css_variables": {"color-brand-primary": "#2563a8", "color-brand-content": "#2563a8"},
    "dark_css_variables": {"color-brand-primary": "#7cb3f0", "color-brand-content": "#7cb3f0"},
}
pygments_style = "friendly"
pygments_dark_style = "github-dark"
copybutton_exclude = ".linenos, .gp, .go"  # neither prompts nor what a command prints
copybutton_prompt_text = r"\$ |>>> |\.\.\. "
copybutton_prompt_is_regexp = True
