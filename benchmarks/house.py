"""Print the size of the project, as its budgets count it: `make house`.  Circles and arrows up: `tests/test_architecture.py`.

A file's head is its module docstring and imports, up to the first line of code.
"""

import argparse
import ast
import subprocess
from collections.abc import Iterable
from pathlib import Path

ROOT = Path(__file__).parent.parent
IMPORTS = (ast.Import, ast.ImportFrom)
Function = ast.FunctionDef | ast.AsyncFunctionDef


def main() -> None:
    """Print every figure."""
    argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0]).parse_args()
    for folder in ("src", "tests", "benchmarks"):
        texts = [path.read_text(encoding="utf-8") for path in sorted((ROOT / folder).rglob("*.py"))]
        trees = [ast.parse(text) for text in texts]
        nodes = [node for tree in trees for node in ast.walk(tree)]
        lines = sum(text.count("\n") for text in texts)
        heads = sum(_head(tree, text) for tree, text in zip(trees, texts, strict=True))
        print(f"{folder:10}  {lines:>7,} lines in {len(texts)} files, {heads / lines:.1%} of them heads")
        print(
            f"{'':10}  {_count(nodes, ast.stmt):>7,} statements, {_count(nodes, Function):,} functions, ",
            end="",
        )
        print(f"{_count(nodes, ast.ClassDef):,} classes")
        skipped = sum(text.count("# fmt" + ": skip") for text in texts)
        print(
            f"{'':10}  {_lazy(nodes):>7,} imports inside functions, {skipped} lines that the formatter skips"
        )
    pages = subprocess.run(["git", "ls-files", "*.md"], cwd=ROOT, capture_output=True, text=True, check=True)
    words = sum(len((ROOT / name).read_text(encoding="utf-8").split()) for name in pages.stdout.splitlines())
    print(f"{'docs':10}  {words:>7,} words")


def _head(tree: ast.Module, text: str) -> int:
    body = [node for node in tree.body if not isinstance(node, IMPORTS) and not _is_text(node)]
    return body[0].lineno - 1 if body else text.count("\n")


def _is_text(node: ast.stmt) -> bool:
    return isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant)


def _count(nodes: Iterable[ast.AST], kind: object) -> int:
    return sum(isinstance(node, kind) for node in nodes)  # type: ignore[arg-type]


def _lazy(nodes: Iterable[ast.AST]) -> int:
    inside = {n for f in nodes if isinstance(f, Function) for n in ast.walk(f) if isinstance(n, IMPORTS)}
    return len(inside)


if __name__ == "__main__":
    main()
