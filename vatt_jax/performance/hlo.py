"""Reading a compiled program's text: what its collectives move and what its memory traffic is, loops counted as often as they turn.

XLA's own cost analysis counts a loop's body once. The text is that of `compiled.as_text()`: scheduled, partitioned, so shapes are one device's.
"""

from __future__ import annotations

import dataclasses
import functools
import math
import re

import numpy as np

BYTES = {
    'pred': 1,
    's4': 0.5,
    'u4': 0.5,
    's8': 1,
    'u8': 1,
    's16': 2,
    'u16': 2,
    'bf16': 2,
    'f16': 2,
    's32': 4,
    'u32': 4,
    'f32': 4,
    's64': 8,
    'u64': 8,
    'f64': 8,
    'c64': 8,
    'c128': 16,
    'f8e4m3fn': 1,
    'f8e5m2': 1,
    'token': 0,
    'opaque': 0,
}
COLLECTIVES = (
    'all-reduce',
    'all-gather',
    'reduce-scatter',
    'all-to-all',
    'collective-permute',
    'ragged-all-to-all',
    'collective-broadcast',
)
FREE = frozenset(
    {
        'parameter',
        'constant',
        'tuple',
        'get-tuple-element',
        'bitcast',
        'after-all',
        'partition-id',
        'replica-id',
        'opt-barrier',
        'while',
        'conditional',
        'call',
        'copy-done',
        'async-update',
        'async-done',
        'add-dependency',
        'domain',
        'custom-call-done',
        'send-done',
        'recv-done',
        *(f'{c}-done' for c in COLLECTIVES),
    }
)
SCATTER = re.compile(
    'all-reduce-scatter'
)  # a TPU's reduce-scatter, written as a fusion of the sum and of the slice that a device keeps
THROUGH = frozenset(
    {'bitcast', 'convert', 'copy', 'reshape', 'transpose'}
)  # of a fusion: what reads only what is read of it


@dataclasses.dataclass(frozen=True)
class Shape:
    """One array. fast: in the chip's on-chip memory (TPU: memory space 1), which HBM does not see."""

    dtype: str
    dims: tuple[int, ...]
    fast: bool = False

    @property
    def bytes(self) -> float:
        return BYTES.get(self.dtype, 4) * math.prod(self.dims)


@dataclasses.dataclass
class Instruction:
    """shapes: of the value, a tuple's parts one after another. called: names of computations by attribute."""

    name: str
    opcode: str
    shapes: list[Shape]
    operands: list[str]
    attributes: str
    root: bool = False

    def called(self, attribute: str) -> str | None:
        found = re.search(rf'\b{attribute}=%?([\w.\-]+)', self.attributes)
        return found[1] if found else None


@dataclasses.dataclass
class Computation:
    name: str
    instructions: dict[str, Instruction]

    @functools.cached_property
    def users(self) -> dict[str, list[Instruction]]:
        out: dict[str, list[Instruction]] = {}
        for i in self.instructions.values():
            for o in dict.fromkeys(i.operands):
                out.setdefault(o, []).append(i)
        return out

    def parameter(self, number: int) -> Instruction | None:
        return next(
            (
                i
                for i in self.instructions.values()
                if i.opcode == 'parameter' and int(i.operands[0]) == number
            ),
            None,
        )

    @property
    def root(self) -> Instruction:
        return next(i for i in self.instructions.values() if i.root)


@dataclasses.dataclass(frozen=True)
class Collective:
    """One collective of the program. bytes: of the full value on one device (what all-gather writes, reduce-scatter reads, the others carry);
    group: devices that take part together; times: how often a step runs it; groups: of the first group, its devices' numbers."""

    kind: str
    bytes: float
    group: int
    times: float
    members: tuple[int, ...] = ()

    @property
    def received(self) -> float:
        """Bytes each device has to take in, once, at the least (ring or tree at their best)."""
        rest = (self.group - 1) / self.group
        return self.bytes * {
            'all-reduce': 2 * rest,
            'collective-permute': 1.0,
            'collective-broadcast': 1.0,
        }.get(self.kind, rest)


@dataclasses.dataclass
class Report:
    """traffic: bytes that one device's HBM reads and writes in a step, each operation reading its operands and writing its result once.
    unknown: loops whose number of turns the text does not tell (counted once)."""

    collectives: list[Collective]
    traffic: float
    unknown: list[str]
    devices: int = 1


_SHAPE = re.compile(r'(\w+)\[([\d,<=]*)\](\{[^{}]*\})?')
_LINE = re.compile(r'^\s*(ROOT )?%?([\w.\-]+) = ')
_HEADER = re.compile(r'^(ENTRY )?%?([\w.\-]+) (?:\([^\n]*\) -> [^\n]*|)\{\s*$')


def shapes_of(text: str) -> list[Shape]:
    return [
        Shape(t, tuple(int(n.lstrip('<=')) for n in dims.split(',') if n), 'S(1)' in (layout or ''))
        for t, dims, layout in _SHAPE.findall(text)
        if t in BYTES
    ]


def _closing(text: str, at: int) -> int:
    """Index of the parenthesis that closes the one at `at`."""
    depth = 0
    for i in range(at, len(text)):
        depth += {'(': 1, ')': -1}.get(text[i], 0)
        if not depth:
            return i
    raise ValueError(f'unbalanced parentheses: {text[:200]}')


def parse(text: str) -> tuple[dict[str, Computation], str]:
    """(computations by name, name of the entry)."""
    computations, entry, current = {}, '', None
    for line in text.splitlines():
        if current is None:
            found = _HEADER.match(line)
            if found and not line.startswith('HloModule'):
                current = computations[found[2]] = Computation(found[2], {})
                entry = found[2] if found[1] else entry
            continue
        if re.match(
            r'\}(?!\})', line
        ):  # `}}` ends the parameters of a Pallas kernel, which take several lines
            current = None
            continue
        found = _LINE.match(line)
        if not found:
            continue
        rest = re.sub(r'/\*[^*]*\*/', '', line[found.end() :])
        end = _closing(rest, 0) + 1 if rest.startswith('(') else rest.index(' ')
        kind, rest = rest[:end], rest[end:].lstrip()
        opening = rest.index('(')
        closing = _closing(rest, opening)
        inside = rest[opening + 1 : closing]
        operands = re.findall(r'%([\w.\-]+)', inside) or re.findall(
            r'(?:^|, )([A-Za-z_][\w.\-]*)(?=,|$)', inside
        )
        opcode = rest[:opening].strip()
        if opcode in ('parameter', 'constant'):
            operands = [inside]
        current.instructions[found[2]] = Instruction(
            found[2], opcode, shapes_of(kind), operands, rest[closing + 1 :], bool(found[1])
        )
    if not entry:
        raise ValueError('no ENTRY computation in this text')
    return computations, entry


def buffers(text: str) -> dict[str, float]:
    """{'arguments', 'temporaries', 'outputs' that do not reuse the arguments' memory}: bytes of HBM in the text of a buffer assignment, each with
    its padding."""
    out = dict.fromkeys(('arguments', 'temporaries', 'outputs'), 0.0)
    for size, kind in re.findall(r'^allocation \d+: size (\d+), (.*):$', text, re.M):
        if re.search(r'color [1-9]|thread-local', kind):  # on the chip; inside one operation
            continue
        out[
            'arguments'
            if kind.startswith('parameter')
            else 'outputs'
            if 'maybe-live-out' in kind
            else 'temporaries'
        ] += int(size)
    return out


def read(text: str) -> Report:
    """Collectives and traffic of a compiled program's text."""
    computations, entry = parse(text)
    devices = math.prod(
        int(n)
        for n in re.findall(r'\b(?:num_partitions|replica_count)=(\d+)', text[: text.index('\n')])
    )
    report, spread = Report([], 0.0, [], devices), {}
    _walk(computations, entry, 1.0, report, spread)
    for collective, moved in spread.values():
        report.collectives.append(collective)
        report.traffic += collective.times * moved
    return report


def _walk(computations, name: str, times: float, report: Report, spread: dict) -> None:
    """spread: collectives that a TPU runs behind several fusions, one after another, each of which names it: {chain: (collective, bytes of HBM)}.
    Such a chain may begin before a loop, go on in it and end after it; it runs as often as the part that runs least."""
    computation = computations[name]
    for i in computation.instructions.values():
        if i.opcode == 'while':
            turns = trip_count(computations, i)
            if turns is None:
                report.unknown.append(i.name)
            _walk(
                computations,
                i.called('body'),
                times * (1 if turns is None else turns),
                report,
                spread,
            )
        elif i.opcode == 'conditional':
            branches = re.search(r'branch_computations=\{([^}]*)\}', i.attributes)
            names = (
                re.findall(r'%?([\w.\-]+)', branches[1])
                if branches
                else [i.called('true_computation'), i.called('false_computation')]
            )
            each = []
            for branch in names:
                part = Report([], 0.0, report.unknown, report.devices)
                _walk(computations, branch, times, part, spread)
                each.append(part)
            worst = max(each, key=lambda p: p.traffic)
            report.collectives += worst.collectives
            report.traffic += worst.traffic
        elif i.opcode in ('call', 'async-start') and (
            inner := i.called('to_apply') or i.called('calls') or i.called('called_computations')
        ):
            _walk(computations, inner, times, report, spread)
        elif i.opcode not in FREE:
            report.traffic += times * traffic(computations, computation, i)
            kind = i.opcode.removesuffix('-start')
            if kind in COLLECTIVES:
                report.collectives.append(_collective(computation, i, kind, times, report.devices))
            elif i.opcode == 'fusion' and (inner := computations.get(i.called('calls') or '')):
                for j in _collectives_in(inner):
                    one = _collective(
                        inner, j, j.opcode.removesuffix('-start'), times, report.devices
                    )
                    # collectives that were put together share channel 1
                    chain = (
                        (i.name, j.name)
                        if SCATTER.match(inner.name)
                        else tuple(re.findall(r'channel_id=(\d+)|chain_id="(\d+)"', j.attributes))
                        or (i.name, j.name)
                    )
                    before = spread.get(chain)
                    if before is None or before[0].times > times:
                        spread[chain] = (
                            one,
                            sum(
                                s.bytes
                                for n in (j, *(inner.instructions[o] for o in j.operands))
                                for s in n.shapes
                                if not s.fast
                            ),
                        )


def trip_count(computations, loop: Instruction) -> float | None:
    """How often a while loop turns: what XLA noted, else the constant that its condition compares a counter from 0 with."""
    found = re.search(r'"known_trip_count":\{"n":"(\d+)"', loop.attributes)
    if found:
        return float(found[1])
    condition = computations.get(loop.called('condition') or '')
    if condition is None:
        return None
    parts = [
        condition,
        *(
            computations[c]
            for i in condition.instructions.values()
            if (c := i.called('calls')) in computations
        ),
    ]
    compares = [i for c in parts for i in c.instructions.values() if i.opcode == 'compare']
    limits = [
        int(i.operands[0])
        for c in parts
        for i in c.instructions.values()
        if i.opcode == 'constant'
        and i.shapes
        and i.shapes[0].dtype in ('s32', 'u32', 's64')
        and re.fullmatch(r'-?\d+', i.operands[0])
    ]
    if len(compares) != 1 or len(limits) != 1 or 'direction=LT' not in compares[0].attributes:
        return None
    return float(limits[0])


def _collectives_in(inner: Computation) -> list[Instruction]:
    return [
        j for j in inner.instructions.values() if j.opcode.removesuffix('-start') in COLLECTIVES
    ]


def _hbm(shapes: list[Shape]) -> float:
    return sum(s.bytes for s in shapes if not s.fast)


def traffic(computations, computation: Computation, i: Instruction) -> float:
    """Bytes of HBM that one run of an instruction reads and writes."""
    operand = lambda n: (
        computation.instructions[i.operands[n]].shapes
        if i.operands[n] in computation.instructions
        else []
    )
    read = [_hbm(operand(n)) for n in range(len(i.operands))]
    written = _hbm(i.shapes)
    if i.opcode in ('dynamic-slice', 'slice', 'gather'):
        return min(read[0], written) + written
    if i.opcode == 'dynamic-update-slice':
        return 2 * read[1]
    if i.opcode == 'copy-start':  # (destination, source, context)
        return read[0] + _hbm(i.shapes[:1])
    if i.opcode.removesuffix('-start') in COLLECTIVES:
        return sum(read) + _hbm(_result(computation, i))
    if i.opcode == 'broadcast' or i.opcode == 'iota':
        return sum(read) + written
    if i.opcode == 'fusion' and (inner := computations.get(i.called('calls') or '')):
        return _fusion(computations, inner, read, i.shapes)
    return sum(read) + written


def _result(computation: Computation, i: Instruction) -> list[Shape]:
    """What a collective yields: of a `-start` with (operands…, results…, context) the results."""
    if not i.opcode.endswith('-start') or i.opcode.startswith('all-reduce'):
        return i.shapes
    n = sum(
        len(computation.instructions[o].shapes) for o in i.operands if o in computation.instructions
    )
    return i.shapes[n : 2 * n] if len(i.shapes) >= 2 * n else i.shapes[-n:]


def _fusion(computations, inner: Computation, read: list[float], written: list[Shape]) -> float:
    """A fusion reads of a parameter that it only slices the slices, and writes of a buffer that it only updates the update."""
    # what a collective behind this fusion moves is counted with its chain
    carried = {
        (s.dtype, s.dims)
        for c in _collectives_in(inner)
        for n in (c, *(inner.instructions[o] for o in c.operands))
        for s in n.shapes
    }
    total, saved = (
        sum(s.bytes for s in written if not s.fast and (s.dtype, s.dims) not in carried),
        0.0,
    )
    for number, whole in enumerate(read):
        parameter = inner.parameter(number)
        if (
            not whole
            or parameter is None
            or any((s.dtype, s.dims) in carried for s in parameter.shapes)
        ):
            continue
        part, kept, all_of_it = _touched(computations, inner, parameter.name)
        total += whole if all_of_it else min(part, whole)
        saved += kept
    return max(total - saved, 0.0)


def _touched(computations, inner: Computation, name: str) -> tuple[float, float, bool]:
    """(bytes that slices of a value take, bytes of it that are updated in place and so neither read nor written, whether all of it is read or
    returned) within a fusion and the fusions in it."""
    part = kept = 0.0
    for user in inner.users.get(name, ()):
        if user.opcode in ('dynamic-slice', 'slice', 'gather') and user.operands[0] == name:
            part += user.shapes[0].bytes
        elif user.opcode == 'dynamic-update-slice' and user.operands[0] == name:
            kept += user.shapes[0].bytes - inner.instructions[user.operands[1]].shapes[0].bytes
        elif user.opcode in THROUGH and not user.root:
            more, in_place, all_of_it = _touched(computations, inner, user.name)
            part, kept = part + more, kept + in_place
            if all_of_it:
                return part, kept, True
        elif user.opcode == 'fusion' and (nested := computations.get(user.called('calls') or '')):
            for number in (n for n, o in enumerate(user.operands) if o == name):
                more, in_place, all_of_it = _touched(
                    computations, nested, nested.parameter(number).name
                )
                part, kept = part + more, kept + in_place
                if all_of_it:
                    return part, kept, True
        else:
            return part, kept, True
    return part, kept, False


def _collective(
    computation: Computation, i: Instruction, kind: str, times: float, devices: int
) -> Collective:
    operands = sum(
        s.bytes
        for o in i.operands
        if o in computation.instructions
        for s in computation.instructions[o].shapes
    )
    results = sum(s.bytes for s in _result(computation, i))
    members = first_group(i.attributes) or list(range(devices))
    group = len(members)
    if SCATTER.match(computation.name):
        kind = 'reduce-scatter'
    if kind == 'collective-permute':
        group = 2
    full = results if kind == 'all-gather' else operands
    return Collective(kind, full, max(group, 1), times, tuple(members))


def first_group(attributes: str) -> list[int]:
    """Numbers of the devices of the first replica group, in any of the ways XLA writes it; for a permute, of its first pair."""
    numbers = lambda text: [int(n) for n in text.split(',')]
    found = re.search(r'replica_groups=\[([\d,]+)\]<=\[([\d,]+)\](?:T\(([\d,]+)\))?', attributes)
    if found:  # [groups, members]<=[axes]T(permutation)
        ids = np.arange(math.prod(numbers(found[2]))).reshape(numbers(found[2]))
        ids = ids.transpose(numbers(found[3])) if found[3] else ids
        return ids.reshape(numbers(found[1]))[0].tolist()
    found = re.search(
        r'replica_groups=mesh\[([^\]]*)\](?:, device_ids=\(\[([\d,]+)\]T\(([\d,]+)\)\))?[^{]*\{([^}]*)\}',
        attributes,
    )
    if found:  # mesh['a'=4,'b'=2] {'a'}; part of an axis: 'a':(1)2; device_ids: their order in it
        sizes = {name: int(n) for name, n in re.findall(r"'([^']+)'=(\d+)", found[1])}
        parts = {name: [1, n, 1] for name, n in sizes.items()}
        chosen = re.findall(r"'([^']+)'(?::\((\d+)\)(\d+))?", found[4])
        for name, before, size in chosen:
            if size:
                parts[name] = [int(before), int(size), sizes[name] // int(before) // int(size)]
        ids = np.arange(math.prod(sizes.values()))
        ids = ids.reshape(numbers(found[2])).transpose(numbers(found[3])) if found[2] else ids
        ids = ids.reshape([n for part in parts.values() for n in part])
        taken = {name for name, _, _ in chosen}
        at = tuple(
            slice(None) if name in taken and k == 1 else 0 for name in parts for k in range(3)
        )
        return ids[at].reshape(-1).tolist()
    found = re.search(r'(?:replica_groups|source_target_pairs)=\{\{([\d,]+)\}', attributes)
    return numbers(found[1]) if found else []


def summary(collectives: list[Collective]) -> list[dict]:
    """Per kind and group size: {'kind', 'group', 'count', 'bytes', 'received'} of one step on one device."""
    rows: dict[tuple[str, int], dict] = {}
    for c in collectives:
        row = rows.setdefault(
            (c.kind, c.group),
            {'kind': c.kind, 'group': c.group, 'count': 0.0, 'bytes': 0.0, 'received': 0.0},
        )
        row['count'] += c.times
        row['bytes'] += c.times * c.bytes
        row['received'] += c.times * c.received
    return sorted(rows.values(), key=lambda r: -r['received'])
