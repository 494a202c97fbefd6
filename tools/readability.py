#!/usr/bin/env python
"""Measures how dense the source is to read: one table, one column per tree.

    python tools/readability.py                      # this project
    python tools/readability.py --by-file            # the same per file, densest first
    python tools/readability.py . ../other_project   # side by side

The numbers are a thermometer, not the aim. A *code line* is a physical line that holds at least one
token of code, so neither blank lines nor comments nor docstrings count. Only the standard library
is needed.
"""

from __future__ import annotations

import argparse
import ast
import dataclasses
import io
import pathlib
import statistics
import sys
import tokenize

SKIPPED_FOLDERS = {'.venv', '.git', 'runs', 'build', 'dist', '__pycache__', 'site-packages'}
TEST_FOLDERS = {'tests', 'test'}
LAYOUT_TOKENS = {
    tokenize.ENCODING,
    tokenize.NL,
    tokenize.NEWLINE,
    tokenize.INDENT,
    tokenize.DEDENT,
    tokenize.ENDMARKER,
}
COMPREHENSIONS = (ast.ListComp, ast.SetComp, ast.DictComp, ast.GeneratorExp)
FUNCTIONS = (ast.FunctionDef, ast.AsyncFunctionDef)
# Each of these adds one way through a function; so does each `if` of a comprehension.
BRANCHES = (
    ast.If,
    ast.For,
    ast.AsyncFor,
    ast.While,
    ast.Try,
    ast.ExceptHandler,
    ast.With,
    ast.Assert,
    ast.IfExp,
    ast.BoolOp,
    ast.comprehension,
    ast.match_case,
)
MANY_PATHS = 10
# What a reader of this project reads: neither tests nor benchmarks.
SOURCE = ('vatt_jax', 'data_pipelines', 'configs', 'run.py')


@dataclasses.dataclass
class Measurement:
    """What was counted in some files; measurements add up."""

    tokens_per_line: list[int] = dataclasses.field(default_factory=list)
    line_lengths: list[int] = dataclasses.field(default_factory=list)
    branches: list[int] = dataclasses.field(default_factory=list)
    function_lines: list[int] = dataclasses.field(default_factory=list)
    comments: int = 0
    conditionals: int = 0
    comprehensions: int = 0
    nested_comprehensions: int = 0
    lambdas: int = 0
    arguments: int = 0
    annotated: int = 0
    test_lines: int = 0

    def __iadd__(self, other: Measurement) -> Measurement:
        for field in dataclasses.fields(self):
            setattr(self, field.name, getattr(self, field.name) + getattr(other, field.name))
        return self

    @property
    def code_lines(self) -> int:
        return len(self.tokens_per_line)

    def share_of_lines_over(self, columns: int) -> float:
        return percent(sum(n > columns for n in self.line_lengths), self.code_lines)

    def rows(self) -> dict[str, str]:
        """Label -> text, in the order in which they are printed."""
        lines = self.code_lines
        per_hundred = [
            percent(count, lines)
            for count in (
                self.conditionals,
                self.comprehensions,
                self.nested_comprehensions,
                self.lambdas,
            )
        ]
        over = [self.share_of_lines_over(columns) for columns in (80, 100, 120)]
        many = sum(n > MANY_PATHS for n in self.branches)
        return {
            'code lines': f'{lines}',
            'tokens per code line, mean (p90)': (
                f'{mean(self.tokens_per_line):.1f} ({percentile(self.tokens_per_line, 90):.0f})'
            ),
            'code lines over 80 / 100 / 120 columns, %': ' / '.join(f'{x:.1f}' for x in over),
            'comment lines per 100 code lines': f'{percent(self.comments, lines):.1f}',
            'conditional expressions / comprehensions / nested ones / lambdas per 100 lines': (
                ' / '.join(f'{x:.2f}' for x in per_hundred)
            ),
            'functions with more than 10 branches, %': f'{percent(many, len(self.branches)):.1f}',
            'lines of a function, median (p90)': (
                f'{percentile(self.function_lines, 50):.0f}'
                f' ({percentile(self.function_lines, 90):.0f})'
            ),
            'arguments annotated, %': f'{percent(self.annotated, self.arguments):.0f}',
            'test lines : code lines': f'{self.test_lines / lines if lines else 0:.2f}',
        }


def percent(part: float, whole: float) -> float:
    return 100 * part / whole if whole else 0.0


def mean(values: list[int]) -> float:
    return statistics.fmean(values) if values else 0.0


def percentile(values: list[int], q: int) -> float:
    if len(values) < 2:
        return float(sum(values))
    return statistics.quantiles(values, n=100, method='inclusive')[q - 1]


def docstring_lines(tree: ast.Module) -> set[int]:
    """Numbers of the lines that belong to docstrings."""
    lines: set[int] = set()
    for node in ast.walk(tree):
        if not isinstance(node, (ast.Module, ast.ClassDef, *FUNCTIONS)):
            continue
        first = node.body[0] if node.body else None
        if isinstance(first, ast.Expr) and isinstance(first.value, ast.Constant):
            if isinstance(first.value.value, str):
                lines.update(range(first.lineno, first.end_lineno + 1))
    return lines


def measure_lines(text: str, tree: ast.Module, result: Measurement) -> None:
    """Counts tokens, columns and comments of every code line of one file."""
    documented = docstring_lines(tree)
    tokens: dict[int, int] = {}
    comment_lines = set()
    for token in tokenize.generate_tokens(io.StringIO(text).readline):
        line = token.start[0]
        if token.type == tokenize.COMMENT:
            comment_lines.add(line)
        elif token.type not in LAYOUT_TOKENS and line not in documented:
            tokens[line] = tokens.get(line, 0) + 1
    result.comments += len(comment_lines)
    lines = text.splitlines()
    for number in sorted(tokens):
        result.tokens_per_line.append(tokens[number])
        result.line_lengths.append(len(lines[number - 1]))


def measure_function(node: ast.FunctionDef | ast.AsyncFunctionDef, result: Measurement) -> None:
    """Counts branches, length and annotated arguments of one function, nested ones included."""
    branches = 1
    for inner in ast.walk(node):
        branches += isinstance(inner, BRANCHES)
        if isinstance(inner, ast.comprehension):
            branches += len(inner.ifs)
    result.branches.append(branches)
    result.function_lines.append(node.end_lineno - node.lineno + 1)
    arguments = [*node.args.posonlyargs, *node.args.args, *node.args.kwonlyargs]
    arguments += [a for a in (node.args.vararg, node.args.kwarg) if a is not None]
    for argument in arguments:
        if argument.arg in ('self', 'cls'):
            continue
        result.arguments += 1
        result.annotated += argument.annotation is not None


def measure_expressions(tree: ast.Module, result: Measurement) -> None:
    """Counts conditional expressions, comprehensions and lambdas of one file."""
    for node in ast.walk(tree):
        result.conditionals += isinstance(node, ast.IfExp)
        result.lambdas += isinstance(node, ast.Lambda)
        if isinstance(node, COMPREHENSIONS):
            result.comprehensions += 1
            inside = [n for child in ast.iter_child_nodes(node) for n in ast.walk(child)]
            if len(node.generators) > 1 or any(isinstance(n, COMPREHENSIONS) for n in inside):
                result.nested_comprehensions += 1
        elif isinstance(node, FUNCTIONS):
            measure_function(node, result)


def measure(path: pathlib.Path) -> Measurement:
    """Counts of one Python file."""
    text = path.read_text(encoding='utf-8')
    tree = ast.parse(text)
    result = Measurement()
    measure_lines(text, tree, result)
    measure_expressions(tree, result)
    return result


def python_files(root: pathlib.Path) -> list[pathlib.Path]:
    """Files below `root`: the source and tests of a project laid out as this one, else all."""
    if root.is_file():
        return [root]
    own = [root / name for name in (*SOURCE, *sorted(TEST_FOLDERS)) if (root / name).exists()]
    folders = own if (root / SOURCE[0]).exists() else [root]
    files = [
        f for folder in folders for f in ([folder] if folder.is_file() else folder.rglob('*.py'))
    ]
    return sorted(f for f in files if not SKIPPED_FOLDERS & set(f.parts))


def is_test(path: pathlib.Path) -> bool:
    named = path.stem.startswith('test_') or path.stem.endswith('_test')
    return named or path.stem == 'conftest' or bool(TEST_FOLDERS & set(path.parts))


def measure_tree(root: pathlib.Path) -> tuple[Measurement, dict[pathlib.Path, Measurement]]:
    """Sums over the source below `root`, and the counts of each file; tests give lines only."""
    total = Measurement()
    by_file = {}
    for path in python_files(root):
        counted = measure(path)
        if is_test(path.relative_to(root) if path != root else path):
            total.test_lines += counted.code_lines
        else:
            by_file[path] = counted
            total += counted
    return total, by_file


def print_table(columns: dict[str, dict[str, str]]) -> None:
    labels = list(next(iter(columns.values())))
    width = max(map(len, labels))
    print('| ' + ' ' * width + ' | ' + ' | '.join(columns) + ' |')
    print('|' + '-' * (width + 2) + '|' + '---|' * len(columns))
    for label in labels:
        cells = [rows[label] for rows in columns.values()]
        print(f'| {label:<{width}} | ' + ' | '.join(cells) + ' |')


def print_files(by_file: dict[pathlib.Path, Measurement]) -> None:
    print('tokens/line  >100  comments  cond  compr  lambda  >10 branches  annotated  lines  file')
    for path, m in sorted(by_file.items(), key=lambda item: -mean(item[1].tokens_per_line)):
        many = sum(n > MANY_PATHS for n in m.branches)
        print(
            f'{mean(m.tokens_per_line):11.1f} {sum(n > 100 for n in m.line_lengths):5d}'
            f' {percent(m.comments, m.code_lines):9.1f}'
            f' {percent(m.conditionals, m.code_lines):5.1f}'
            f' {percent(m.comprehensions, m.code_lines):6.1f}'
            f' {percent(m.lambdas, m.code_lines):7.1f} {many:6d}/{len(m.branches):<6d}'
            f' {percent(m.annotated, m.arguments):8.0f}% {m.code_lines:6d}  {path}'
        )


def main(arguments: list[str]) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument('trees', nargs='*', default=['.'], help='folders or files')
    parser.add_argument('--by-file', action='store_true', help='one line per file too')
    flags = parser.parse_args(arguments)
    columns = {}
    for tree in flags.trees:
        total, by_file = measure_tree(pathlib.Path(tree))
        columns[tree] = total.rows()
        if flags.by_file:
            print_files(by_file)
    print_table(columns)


if __name__ == '__main__':
    main(sys.argv[1:])
