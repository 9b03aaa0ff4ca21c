"""What the site of mkdocs.yml adds to the pages of this folder: those of the root, the API, and links between them."""

import ast
import re
import textwrap
from pathlib import Path

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files

ROOT = Path(__file__).parent.parent
OF_THE_ROOT = {"README.md": "index.md", "CONTRIBUTING.md": "contributing.md", "CHANGELOG.md": "changelog.md"}
MODULES = {
    "Integrations": [f"qrm_fast.integrations.{name}" for name in ("trl", "padded", "rewards")],
    "The loop": [
        f"qrm_fast.rl.{name}" for name in ("rewards", "config", "policy", "rollout", "attention", "span_projection")
    ],
}


def on_config(config: MkDocsConfig) -> MkDocsConfig:
    """A page that the navigation does not name stands at its end."""
    named = re.findall(r"[\w-]+\.md", str(config.nav))
    config.nav += sorted(page.name for page in Path(config.docs_dir).glob("*.md") if page.name not in named)
    return config


def on_files(files: Files, config: MkDocsConfig) -> Files:
    for source, page in OF_THE_ROOT.items():
        files.append(File.generated(config, page, content=(ROOT / source).read_text()))
    files.append(File.generated(config, "which-op.md", content=which_op_when()))
    files.append(File.generated(config, "api-ops.md", content=ops()))
    for title, modules in MODULES.items():
        parts = [f"# {title}", *(f"::: {module}\n    options: {{show_root_full_path: true}}" for module in modules)]
        page = f"api-{title.split()[-1].lower()}.md"
        files.append(File.generated(config, page, content="\n\n".join(parts)))
    for example in sorted((ROOT / "examples").glob("*.py")):
        files.append(File.generated(config, f"examples/{example.name}", abs_src_path=str(example)))
    return files


def public() -> dict[str, Path]:
    """The names that `import qrm_fast` offers, and the files that define them."""
    package = ROOT / "qrm_fast"
    body = ast.parse((package / "__init__.py").read_text()).body
    names = next(ast.literal_eval(x.value) for x in body if isinstance(x, ast.Assign) and x.targets[0].id == "__all__")
    imports = {name.name: x.module for x in body if isinstance(x, ast.ImportFrom) and x.level for name in x.names}
    return {name: package / f"{imports[name].replace('.', '/')}.py" for name in names}


def which_op_when() -> str:
    """README's section of that name, whose ops lead to the API."""
    section = (ROOT / "README.md").read_text().partition("\n## Which op when")[2].partition("\n## ")[0]
    names = public()
    linked = re.sub(r"`(\w+)`", lambda m: f"[{m[0]}][qrm_fast.{m[1]}]" if m[1] in names else m[0], section)
    return f"# Which op when\n{linked}"


def ops() -> str:
    """Every public function, then the named tuples they return, with the fields as their file has them."""
    functions, results = [], ["## Results"]
    for name, path in public().items():
        if name.islower():
            functions.append(f"::: qrm_fast.{name}")
            continue
        source = path.read_text()
        (found,) = (x for x in ast.parse(source).body if isinstance(x, ast.ClassDef) and x.name == name)
        fields = [x for x in found.body if isinstance(x, ast.AnnAssign)]
        lines = textwrap.dedent("\n".join(source.splitlines()[fields[0].lineno - 1 : fields[-1].end_lineno]))
        options = "    options: {members: false, heading_level: 3, show_if_no_docstring: true}"
        results.append(f"::: qrm_fast.{name}\n{options}\n\n```python\n{lines}\n```")
    return "\n\n".join(["# Ops and packing", *functions, *results])


def on_page_markdown(markdown: str, **_) -> str:
    """Links of the repository become links of the site; marks of generated tables are no HTML blocks."""
    markdown = markdown.replace("(../README.md#which-op-when)", "(which-op.md)")
    for source, page in OF_THE_ROOT.items():
        markdown = re.sub(rf"\]\((\.\./)?{source}", f"]({page}", markdown)
    markdown = re.sub(r"\]\((?:docs/|\.\./(?=examples/))", "](", markdown)
    return re.sub(r"<!--.*?-->\n?", "\n", markdown)
