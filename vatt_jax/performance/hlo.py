"""Collectives and memory traffic of a compiled program, read from its HLO text.

XLA's own cost analysis counts the body of a loop once; here it counts as often as the loop runs.
The text is that of `compiled.as_text()`: scheduled and partitioned, so all shapes are those of one
device.
"""

from __future__ import annotations

import dataclasses
import functools
import math
import re
from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np

# Bytes of one element. Half a byte: XLA packs two 4-bit integers into one byte.
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

# Operations that move no bytes of their own: they name or regroup buffers that exist, or their
# bytes are counted elsewhere (those of control flow in the computations that it calls, those of a
# `-done` at its `-start`).
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
        *(f'{kind}-done' for kind in COLLECTIVES),
    }
)

# The name of a fusion that is a TPU's reduce-scatter: it is written as the all-reduce together with
# the slice of its result that belongs to the device.
REDUCE_SCATTER_FUSION = re.compile('all-reduce-scatter')

# Inside a fusion these are computed on the fly, element by element: they read of their operand only
# what their own users read of them.
PASS_THROUGH = frozenset({'bitcast', 'convert', 'copy', 'reshape', 'transpose'})


@dataclasses.dataclass(frozen=True)
class Shape:
    """Type and size of one array.

    Attributes:
      dtype: A key of `BYTES`.
      dims: Its dimensions.
      fast: Whether it lies in the chip's on-chip memory (TPU: memory space 1), so that HBM sees no
        traffic of it.
    """

    dtype: str
    dims: tuple[int, ...]
    fast: bool = False

    @property
    def bytes(self) -> float:
        return BYTES.get(self.dtype, 4) * math.prod(self.dims)


@dataclasses.dataclass
class Instruction:
    """One line of a computation.

    Attributes:
      name: Unique in the program, without the leading %.
      opcode: What it does, such as 'fusion'.
      shapes: Of its value; the parts of a tuple one after another.
      operands: Names of its operands. Of a parameter its number, of a constant its value, as text.
      attributes: The rest of the line, after the operands.
      root: Whether it is the value of its computation.
    """

    name: str
    opcode: str
    shapes: list[Shape]
    operands: list[str]
    attributes: str
    root: bool = False

    @property
    def base_opcode(self) -> str:
        """The opcode, for both the synchronous and the asynchronous form."""
        return self.opcode.removesuffix('-start')

    def called(self, attribute: str) -> str:
        """Name of the computation that an attribute refers to; '' without that attribute."""
        found = re.search(rf'\b{attribute}=%?([\w.\-]+)', self.attributes)
        return found[1] if found else ''


@dataclasses.dataclass
class Computation:
    """A function of the program: its instructions by name, in the order they run."""

    name: str
    instructions: dict[str, Instruction]

    @functools.cached_property
    def users(self) -> dict[str, list[Instruction]]:
        """Name of a value -> the instructions that have it as an operand, each once."""
        users: dict[str, list[Instruction]] = {}
        for instruction in self.instructions.values():
            # An instruction may take the same operand twice; a dict removes repeats in order.
            for operand in dict.fromkeys(instruction.operands):
                users.setdefault(operand, []).append(instruction)
        return users

    def parameter(self, number: int) -> Instruction | None:
        for instruction in self.instructions.values():
            if instruction.opcode == 'parameter' and int(instruction.operands[0]) == number:
                return instruction
        return None

    @property
    def root(self) -> Instruction:
        return next(i for i in self.instructions.values() if i.root)

    def shapes_of_operands(self, instruction: Instruction) -> list[list[Shape]]:
        """Shapes of each operand; empty for one that is not an instruction of this computation."""
        shapes = []
        for operand in instruction.operands:
            producer = self.instructions.get(operand)
            shapes.append(producer.shapes if producer else [])
        return shapes


# Name of a computation -> the computation.
Computations = Mapping[str, Computation]


@dataclasses.dataclass(frozen=True)
class Collective:
    """One collective operation of the program.

    Attributes:
      kind: One of `COLLECTIVES`.
      bytes: Of the full value on one device: what an all-gather writes, what a reduce-scatter
        reads, what the others carry.
      group: Number of devices that take part together.
      times: How often one step runs it.
      members: Numbers of the devices of the first group.
    """

    kind: str
    bytes: float
    group: int
    times: float
    members: tuple[int, ...] = ()

    @property
    def received(self) -> float:
        """Bytes that each device has to receive in one run, at the least (ideal ring or tree)."""
        # The share of the full value that a device does not hold itself.
        others = (self.group - 1) / self.group
        if self.kind == 'all-reduce':
            # A reduce-scatter followed by an all-gather.
            return self.bytes * (2 * others)
        if self.kind in ('collective-permute', 'collective-broadcast'):
            return self.bytes * 1.0
        return self.bytes * others


@dataclasses.dataclass
class Report:
    """What one step of a program moves, on one device.

    Attributes:
      collectives: Every collective, with how often it runs.
      traffic: Bytes of HBM read and written, if each operation reads its operands and writes its
        result once.
      unknown: Names of loops whose number of iterations is not in the text; they are counted once.
      devices: Number of devices of the program.
    """

    collectives: list[Collective]
    traffic: float
    unknown: list[str]
    devices: int = 1


@dataclasses.dataclass
class _ChainPart:
    """The part of a chain of fusions that runs least often, see `_add_chain_parts`."""

    collective: Collective
    hbm_bytes: float


# Identity of a chain of fusions -> its part that runs least often.
_Chains = dict[tuple[Any, ...], _ChainPart]


# ---- Parsing

# f32[8,<=128]{1,0:T(8,128)S(1)}: type, dimensions (<= marks a dynamic one), layout with the memory
# space at its end.
_SHAPE = re.compile(r'(\w+)\[([\d,<=]*)\](\{[^{}]*\})?')
# [ROOT] %name = …
_LINE = re.compile(r'^\s*(ROOT )?%?([\w.\-]+) = ')
# [ENTRY] %name (parameters) -> type {, or without parameters and type.
_HEADER = re.compile(r'^(ENTRY )?%?([\w.\-]+) (?:\([^\n]*\) -> [^\n]*|)\{\s*$')
# Ends a computation. `}}` does not: it ends the parameters of a Pallas kernel, which are text with
# line breaks.
_FOOTER = re.compile(r'\}(?!\})')


def shapes_of(text: str) -> list[Shape]:
    """Shapes in the text of a type, which may be a tuple."""
    shapes = []
    for dtype, dims, layout in _SHAPE.findall(text):
        # Other words in front of brackets are not types.
        if dtype not in BYTES:
            continue
        sizes = tuple(int(size.lstrip('<=')) for size in dims.split(',') if size)
        shapes.append(Shape(dtype, sizes, fast='S(1)' in layout))
    return shapes


def _closing(text: str, opening: int) -> int:
    """Index of the parenthesis that closes the one at index `opening`."""
    depth = 0
    for i in range(opening, len(text)):
        if text[i] == '(':
            depth += 1
        elif text[i] == ')':
            depth -= 1
        if depth == 0:
            return i
    raise ValueError(f'unbalanced parentheses: {text[:200]}')


def parse(text: str) -> tuple[dict[str, Computation], str]:
    """Parse the text of a compiled program.

    Args:
      text: Of `compiled.as_text()`.

    Returns:
      Its computations by name, and the name of the entry computation.

    Raises:
      ValueError: The text has no entry computation.
    """
    computations: dict[str, Computation] = {}
    entry = ''
    current: Computation | None = None
    for line in text.splitlines():
        if current is None:
            header = _HEADER.match(line)
            # The first line of the module can look like that of a computation.
            if header and not line.startswith('HloModule'):
                current = Computation(header[2], {})
                computations[header[2]] = current
                if header[1]:
                    entry = header[2]
        elif _FOOTER.match(line):
            current = None
        else:
            instruction = _parse_instruction(line)
            if instruction is not None:
                current.instructions[instruction.name] = instruction
    if not entry:
        raise ValueError('no ENTRY computation in this text')
    return computations, entry


def _parse_instruction(line: str) -> Instruction | None:
    """Parse `[ROOT] %name = type opcode(operands), attributes`; None for any other line."""
    found = _LINE.match(line)
    if not found:
        return None
    # Long tuples carry comments such as /*index=5*/.
    rest = re.sub(r'/\*[^*]*\*/', '', line[found.end() :])
    # A tuple's type has spaces in it: it ends with its parenthesis, any other at the first space.
    type_end = _closing(rest, 0) + 1 if rest.startswith('(') else rest.index(' ')
    value_type = rest[:type_end]
    rest = rest[type_end:].lstrip()

    opening = rest.index('(')
    closing = _closing(rest, opening)
    opcode = rest[:opening].strip()
    inside = rest[opening + 1 : closing]
    if opcode in ('parameter', 'constant'):
        operands = [inside]
    else:
        operands = re.findall(r'%([\w.\-]+)', inside)
        if not operands:
            # XLA can also print names without %.
            operands = re.findall(r'(?:^|, )([A-Za-z_][\w.\-]*)(?=,|$)', inside)
    return Instruction(
        name=found[2],
        opcode=opcode,
        shapes=shapes_of(value_type),
        operands=operands,
        attributes=rest[closing + 1 :],
        root=bool(found[1]),
    )


def buffers(text: str) -> dict[str, float]:
    """Sum the allocations in HBM that XLA's buffer assignment lists.

    Args:
      text: Of the dump `*buffer-assignment.txt`.

    Returns:
      Bytes of 'arguments', 'temporaries' and 'outputs', padding included. Outputs are only those
      that do not reuse the memory of an argument.
    """
    sizes = {'arguments': 0.0, 'temporaries': 0.0, 'outputs': 0.0}
    for size, description in re.findall(r'^allocation \d+: size (\d+), (.*):$', text, re.M):
        # Other colors than 0 are on-chip memory; thread-local buffers live inside one operation.
        if re.search(r'color [1-9]|thread-local', description):
            continue
        # Parameters come first: one that an output reuses is marked maybe-live-out as well.
        if description.startswith('parameter'):
            part = 'arguments'
        elif 'maybe-live-out' in description:
            part = 'outputs'
        else:
            part = 'temporaries'
        sizes[part] += int(size)
    return sizes


# ---- Counting


def read(text: str) -> Report:
    """Count collectives and memory traffic of one step.

    Args:
      text: Of `compiled.as_text()`.

    Returns:
      The report, loops counted as often as they run.
    """
    computations, entry = parse(text)
    first_line = text[: text.index('\n')]
    counts = re.findall(r'\b(?:num_partitions|replica_count)=(\d+)', first_line)
    devices = math.prod(int(count) for count in counts)

    report = Report([], 0.0, [], devices)
    chains: _Chains = {}
    _walk(computations, entry, 1.0, report, chains)
    # How often a chain runs is known only after its last part was seen.
    for part in chains.values():
        report.collectives.append(part.collective)
        report.traffic += part.collective.times * part.hbm_bytes
    return report


def _walk(
    computations: Computations, name: str, times: float, report: Report, chains: _Chains
) -> None:
    """Add what a computation moves, and what those that it calls do.

    Args:
      computations: All of the program.
      name: The computation.
      times: How often one step runs it.
      report: Is added to.
      chains: Is added to, see `_add_chain_parts`.
    """
    computation = computations[name]
    for instruction in computation.instructions.values():
        opcode = instruction.opcode
        if opcode == 'while':
            _walk_loop(computations, instruction, times, report, chains)
        elif opcode == 'conditional':
            _walk_conditional(computations, instruction, times, report, chains)
        elif opcode in ('call', 'async-start') and _callee(instruction):
            _walk(computations, _callee(instruction), times, report, chains)
        elif opcode not in FREE:
            _add_operation(computations, computation, instruction, times, report, chains)


def _walk_loop(
    computations: Computations, loop: Instruction, times: float, report: Report, chains: _Chains
) -> None:
    iterations = trip_count(computations, loop)
    if iterations is None:
        report.unknown.append(loop.name)
        iterations = 1
    # The condition is left out: it compares a scalar.
    _walk(computations, loop.called('body'), times * iterations, report, chains)


def _walk_conditional(
    computations: Computations, cond: Instruction, times: float, report: Report, chains: _Chains
) -> None:
    """Add the branch with the most traffic: which one runs is not known from the text."""
    # Written as a list, or as two attributes where the predicate is a boolean.
    listed = re.search(r'branch_computations=\{([^}]*)\}', cond.attributes)
    if listed:
        branches = re.findall(r'%?([\w.\-]+)', listed[1])
    else:
        branches = [cond.called('true_computation'), cond.called('false_computation')]

    branch_reports = []
    for branch in branches:
        # Loops of unknown length are reported for every branch, so the list is shared.
        branch_report = Report([], 0.0, report.unknown, report.devices)
        _walk(computations, branch, times, branch_report, chains)
        branch_reports.append(branch_report)
    worst = max(branch_reports, key=lambda branch_report: branch_report.traffic)
    report.collectives += worst.collectives
    report.traffic += worst.traffic


def _callee(instruction: Instruction) -> str:
    """Name of the computation that a call runs, under whichever attribute; '' without any."""
    for attribute in ('to_apply', 'calls', 'called_computations'):
        name = instruction.called(attribute)
        if name:
            return name
    return ''


def _add_operation(
    computations: Computations,
    computation: Computation,
    instruction: Instruction,
    times: float,
    report: Report,
    chains: _Chains,
) -> None:
    report.traffic += times * traffic(computations, computation, instruction)
    if instruction.base_opcode in COLLECTIVES:
        report.collectives.append(_collective(computation, instruction, times, report.devices))
    elif instruction.opcode == 'fusion':
        fused = computations.get(instruction.called('calls'))
        if fused is not None:
            _add_chain_parts(instruction, fused, times, report.devices, chains)


def _add_chain_parts(
    fusion: Instruction, fused: Computation, times: float, devices: int, chains: _Chains
) -> None:
    """Record the collectives inside a fusion.

    A TPU runs one collective behind the arithmetic of several fusions, one after another, each of
    which names it. Such a chain may begin before a loop, go on in it and end after it. It is still
    one collective: it runs as often as the part that runs least.
    """
    for instruction in _collectives_in(fused):
        chain = _chain_of(fusion, fused, instruction)
        known = chains.get(chain)
        if known is None or known.collective.times > times:
            collective = _collective(fused, instruction, times, devices)
            chains[chain] = _ChainPart(collective, _hbm(_values_of(fused, instruction)))


def _chain_of(fusion: Instruction, fused: Computation, collective: Instruction) -> tuple[Any, ...]:
    """What all fusions of one chain have in common; the names of this one where it stands alone."""
    alone = (fusion.name, collective.name)
    # These are whole by themselves, and their channel does not tell them apart: collectives that
    # XLA put together share channel 1.
    if REDUCE_SCATTER_FUSION.match(fused.name):
        return alone
    identifiers = re.findall(r'channel_id=(\d+)|chain_id="(\d+)"', collective.attributes)
    return tuple(identifiers) if identifiers else alone


def trip_count(computations: Computations, loop: Instruction) -> float | None:
    """Number of iterations of a while loop, or None where the text does not say.

    It is what XLA recorded, else the constant that the condition compares a counter from 0 with,
    as every `lax.scan` has it. TPU programs do not always carry XLA's number.
    """
    recorded = re.search(r'"known_trip_count":\{"n":"(\d+)"', loop.attributes)
    if recorded:
        return float(recorded[1])
    condition = computations.get(loop.called('condition'))
    if condition is None:
        return None

    # The comparison may have been fused: it then stands in a computation that the condition calls.
    parts = [condition]
    for instruction in condition.instructions.values():
        fused = computations.get(instruction.called('calls'))
        if fused is not None:
            parts.append(fused)

    compares = []
    limits = []
    for part in parts:
        for instruction in part.instructions.values():
            if instruction.opcode == 'compare':
                compares.append(instruction)
            elif instruction.opcode == 'constant' and _is_integer(instruction):
                limits.append(int(instruction.operands[0]))
    # With more than one candidate any choice would be a guess.
    if len(compares) != 1 or len(limits) != 1:
        return None
    if 'direction=LT' not in compares[0].attributes:
        return None
    return float(limits[0])


def _is_integer(constant: Instruction) -> bool:
    """Whether a constant is a whole number, of a type that a loop counter has."""
    if not constant.shapes or constant.shapes[0].dtype not in ('s32', 'u32', 's64'):
        return False
    return re.fullmatch(r'-?\d+', constant.operands[0]) is not None


def _collectives_in(computation: Computation) -> list[Instruction]:
    return [i for i in computation.instructions.values() if i.base_opcode in COLLECTIVES]


def _values_of(fused: Computation, collective: Instruction) -> list[Shape]:
    """Shapes of the value and of the operands of a collective inside a fusion."""
    shapes = list(collective.shapes)
    for operand in collective.operands:
        shapes += fused.instructions[operand].shapes
    return shapes


def _hbm(shapes: Iterable[Shape]) -> float:
    """Bytes of those shapes that lie in HBM."""
    return sum(shape.bytes for shape in shapes if not shape.fast)


# ---- Traffic of one operation


def traffic(
    computations: Computations, computation: Computation, instruction: Instruction
) -> float:
    """Bytes of HBM that one run of an instruction reads and writes.

    Args:
      computations: All of the program.
      computation: The one that the instruction is part of.
      instruction: Not one of `FREE`.

    Returns:
      Bytes. Each operand is read and the result written once, but for the exceptions inside.
    """
    opcode = instruction.opcode
    read = [_hbm(shapes) for shapes in computation.shapes_of_operands(instruction)]
    written = _hbm(instruction.shapes)
    if opcode in ('dynamic-slice', 'slice', 'gather'):
        # No more is read than the part that is taken.
        return min(read[0], written) + written
    if opcode == 'dynamic-update-slice':
        # In place: the update (operand 1) is read and written, the rest of the buffer stays.
        return 2 * read[1]
    if opcode == 'copy-start':
        # Its value is (destination, source, context): only the first is written.
        return read[0] + _hbm(instruction.shapes[:1])
    if instruction.base_opcode in COLLECTIVES:
        return sum(read) + _hbm(_result(computation, instruction))
    if opcode == 'fusion':
        fused = computations.get(instruction.called('calls'))
        if fused is not None:
            return _fusion_traffic(computations, fused, read, instruction.shapes)
    return sum(read) + written


def _result(computation: Computation, collective: Instruction) -> list[Shape]:
    """The results of a collective alone.

    The value of a `-start` is (operands…, results…, context…). That of an all-reduce-start is the
    results only.
    """
    shapes = collective.shapes
    if not collective.opcode.endswith('-start') or collective.opcode.startswith('all-reduce'):
        return shapes
    count = sum(len(operand) for operand in computation.shapes_of_operands(collective))
    if len(shapes) >= 2 * count:
        return shapes[count : 2 * count]
    return shapes[-count:]


def _fusion_traffic(
    computations: Computations, fused: Computation, read: list[float], written: list[Shape]
) -> float:
    """Bytes of HBM that a fusion reads and writes.

    Of a parameter that it only slices, a fusion reads the slices; of a buffer that it only updates
    in place, it writes the update. A scan over layers does both: it slices the stacked weights and
    updates the stacked activations.

    Args:
      computations: All of the program.
      fused: The computation of the fusion.
      read: Bytes in HBM of each operand.
      written: Shapes of its value.
    """
    # What a collective behind this fusion moves is counted with its chain. Its buffers come in and
    # go out beside those of the arithmetic and are recognised by type and dimensions alone.
    carried = set()
    for collective in _collectives_in(fused):
        carried |= {(shape.dtype, shape.dims) for shape in _values_of(fused, collective)}

    def is_carried(shape: Shape) -> bool:
        return (shape.dtype, shape.dims) in carried

    total = _hbm(shape for shape in written if not is_carried(shape))
    untouched = 0.0
    for number, operand_bytes in enumerate(read):
        parameter = fused.parameter(number)
        if not operand_bytes or parameter is None:
            continue
        if any(is_carried(shape) for shape in parameter.shapes):
            continue
        access = _access(computations, fused, parameter.name)
        # Slices that overlap can add up to more than the whole: that much is read at most.
        total += operand_bytes if access.whole else min(access.sliced, operand_bytes)
        untouched += access.untouched
    return max(total - untouched, 0.0)


@dataclasses.dataclass
class _Access:
    """How a fusion uses one value.

    Attributes:
      sliced: Bytes that slices of it take.
      untouched: Bytes of it that an update in place neither reads nor writes. They are part of the
        fusion's output shape, so they are subtracted from what it writes.
      whole: Whether all of it is read or returned.
    """

    sliced: float = 0.0
    untouched: float = 0.0
    whole: bool = False

    def add(self, other: _Access) -> None:
        self.sliced += other.sliced
        self.untouched += other.untouched
        self.whole = self.whole or other.whole


def _access(computations: Computations, fused: Computation, name: str) -> _Access:
    """How a fusion, and the fusions in it, use a value of it."""
    access = _Access()
    for user in fused.users.get(name, ()):
        access.add(_access_by(computations, fused, user, name))
        if access.whole:
            break
    return access


def _access_by(
    computations: Computations, fused: Computation, user: Instruction, name: str
) -> _Access:
    """How one instruction of a fusion uses the value `name`, which is an operand of it."""
    # As a later operand of a slice or update the value is an index or the update: read whole.
    is_first = user.operands[0] == name
    if user.opcode in ('dynamic-slice', 'slice', 'gather') and is_first:
        return _Access(sliced=user.shapes[0].bytes)
    if user.opcode == 'dynamic-update-slice' and is_first:
        update = fused.instructions[user.operands[1]]
        return _Access(untouched=user.shapes[0].bytes - update.shapes[0].bytes)
    # At the root all of it is returned.
    if user.opcode in PASS_THROUGH and not user.root:
        return _access(computations, fused, user.name)

    nested = computations.get(user.called('calls')) if user.opcode == 'fusion' else None
    if nested is None:
        return _Access(whole=True)
    access = _Access()
    for number, operand in enumerate(user.operands):
        if operand != name:
            continue
        parameter = nested.parameter(number)
        assert parameter is not None, 'a fusion has a parameter for each operand'
        access.add(_access(computations, nested, parameter.name))
        if access.whole:
            break
    return access


# ---- Collectives


def _collective(
    computation: Computation, instruction: Instruction, times: float, devices: int
) -> Collective:
    """Describe a collective instruction of a program of `devices` devices."""
    kind = instruction.base_opcode
    if REDUCE_SCATTER_FUSION.match(computation.name):
        kind = 'reduce-scatter'
    # Without any group listed, all devices form one.
    members = first_group(instruction.attributes) or list(range(devices))
    # A permute sends within pairs, however many of them are listed.
    group = 2 if kind == 'collective-permute' else len(members)

    # The full value is the result of an all-gather and the operand of a reduce-scatter; elsewhere
    # both have its size. On-chip buffers count as well: the links carry them all the same.
    if kind == 'all-gather':
        shapes = _result(computation, instruction)
    else:
        shapes = [s for operand in computation.shapes_of_operands(instruction) for s in operand]
    num_bytes = sum(shape.bytes for shape in shapes)
    return Collective(kind, num_bytes, max(group, 1), times, tuple(members))


def first_group(attributes: str) -> list[int]:
    """Read which devices take part in a collective together.

    Args:
      attributes: Of the instruction.

    Returns:
      Numbers of the devices of the first replica group, in any of XLA's notations; for a permute,
      of its first pair. Empty where no group is listed.
    """
    for read_notation in (_iota_group, _mesh_group, _listed_group):
        group = read_notation(attributes)
        if group is not None:
            return group
    return []


def _numbers(text: str) -> list[int]:
    return [int(number) for number in text.split(',')]


def _iota_group(attributes: str) -> list[int] | None:
    """Of `[groups,members]<=[axes]T(permutation)`: all devices, reshaped, transposed, reshaped."""
    found = re.search(r'replica_groups=\[([\d,]+)\]<=\[([\d,]+)\](?:T\(([\d,]+)\))?', attributes)
    if not found:
        return None
    groups_shape, axes = _numbers(found[1]), _numbers(found[2])
    device_ids = np.arange(math.prod(axes)).reshape(axes)
    if found[3]:
        device_ids = device_ids.transpose(_numbers(found[3]))
    return device_ids.reshape(groups_shape)[0].tolist()


def _mesh_group(attributes: str) -> list[int] | None:
    """Of `mesh['a'=4,'b'=2] {'a'}`: the devices along the axes named in braces.

    Part of an axis is written `'a':(1)2`: the size of what comes before it in the axis, then its
    own size.
    `device_ids=([axes]T(permutation))` after the mesh gives the order of the devices in it.
    """
    found = re.search(
        r'replica_groups=mesh\[([^\]]*)\]'
        r'(?:, device_ids=\(\[([\d,]+)\]T\(([\d,]+)\)\))?'
        r'[^{]*\{([^}]*)\}',
        attributes,
    )
    if not found:
        return None
    axis_sizes = {name: int(size) for name, size in re.findall(r"'([^']+)'=(\d+)", found[1])}
    device_ids = np.arange(math.prod(axis_sizes.values()))
    if found[2]:
        device_ids = device_ids.reshape(_numbers(found[2])).transpose(_numbers(found[3]))

    # Every axis is cut into three: before, the part that takes part, and after.
    cuts = {name: [1, size, 1] for name, size in axis_sizes.items()}
    chosen = re.findall(r"'([^']+)'(?::\((\d+)\)(\d+))?", found[4])
    for name, before, size in chosen:
        if size:
            after = axis_sizes[name] // int(before) // int(size)
            cuts[name] = [int(before), int(size), after]
    cut_shape = [size for cut in cuts.values() for size in cut]

    # The first group has all of the parts that take part, and the first of everything else.
    chosen_names = {name for name, _, _ in chosen}
    index: list[int | slice] = []
    for name in cuts:
        index += [0, slice(None) if name in chosen_names else 0, 0]
    return device_ids.reshape(cut_shape)[tuple(index)].reshape(-1).tolist()


def _listed_group(attributes: str) -> list[int] | None:
    """Of `{{0,1,2},{3,4,5}}`; of a permute these are pairs of source and target."""
    found = re.search(r'(?:replica_groups|source_target_pairs)=\{\{([\d,]+)\}', attributes)
    return _numbers(found[1]) if found else None


def summary(collectives: Iterable[Collective]) -> list[dict[str, Any]]:
    """Sum the collectives of one step on one device by kind and group size.

    Returns:
      Rows of 'kind', 'group', 'count', 'bytes' and 'received', the most received bytes first.
    """
    rows: dict[tuple[str, int], dict[str, Any]] = {}
    for collective in collectives:
        kind, group = collective.kind, collective.group
        empty = {'kind': kind, 'group': group, 'count': 0.0, 'bytes': 0.0, 'received': 0.0}
        row = rows.setdefault((kind, group), empty)
        row['count'] += collective.times
        row['bytes'] += collective.times * collective.bytes
        row['received'] += collective.times * collective.received
    return sorted(rows.values(), key=lambda row: -row['received'])
