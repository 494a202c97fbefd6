"""A plan as text."""

from __future__ import annotations

import io
import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from rich import box
from rich.console import Console
from rich.table import Table


def table(result: Mapping[str, Any], width: int = 118) -> str:
    """Lay out a plan as text.

    Args:
        result: what `plan` returned.
        width: of the tables, in characters.
    """
    page = _Page(width)
    _show_run(page, result)
    _show_parameters(page, result['parameters'])
    _show_flops(page, result['flops'])
    _show_memory(page, result['memory'])
    _show_collectives(page, result['collectives'])
    _show_roofline(page, result)
    if 'bound' in result['roofline']:
        _show_bound(page, result)
    for note in result['notes']:
        page.say(f'note: {note}')
    if result['compiled']:
        source = ' (kept from before)' if result.get('cached') else ''
        page.say(f'compiled in {result["compiled"]["seconds"]} s{source}')
    else:
        page.say('nothing compiled')
    return page.text()


class _Page:
    """Text under way: sentences and tables, one below the other."""

    def __init__(self, width: int) -> None:
        self._file = io.StringIO()
        # A fixed width and no colours: the same text in a terminal, a pipe and a file.
        # Names are text: neither [brackets] nor :words: in them mean styles and pictures.
        self._console = Console(
            width=width, file=self._file, color_system=None, markup=False, emoji=False
        )

    def say(self, text: str) -> None:
        # soft_wrap: long sentences stay whole, to be searched for and copied.
        self._console.print(text, highlight=False, soft_wrap=True)

    def show(self, title: str, columns: Sequence[str], rows: Iterable[Sequence[str]]) -> None:
        layout = Table(
            title=title,
            title_justify='left',
            title_style='',
            header_style='',
            box=box.SIMPLE_HEAD,
            show_edge=False,
            pad_edge=False,
        )
        for i, column in enumerate(columns):
            # Numbers are right-aligned; the first column holds names.
            layout.add_column(column, justify='right' if i else 'left')
        for row in rows:
            layout.add_row(*row)
        self._console.print(layout)
        self.say('')

    def text(self) -> str:
        return self._file.getvalue()


def _amount(value: float | None, unit: float = 1.0) -> str:
    """A number in a unit, with three digits or as many as stand before the point."""
    if value is None:
        return 'unknown'
    # Beyond that '.3g' turns to exponents: 1234 would be 1.23e+03.
    if abs(value) < 1000 * unit:
        return f'{value / unit:.3g}'
    return f'{value / unit:.0f}'


# ---- sections
def _show_run(page: _Page, result: Mapping[str, Any]) -> None:
    # Axes of one device say nothing.
    axes = [f'{axis}={size}' for axis, size in result['mesh'].items() if size > 1]
    mesh = ' × '.join(axes) or 'one device'
    plural = 's' if result['hosts'] > 1 else ''
    page.say(
        f'{result["config"]} on {result["topology"]}: {result["devices"]} devices of '
        f'{result["hosts"]} host{plural}, mesh {mesh}'
    )
    parts = f' in {result["accumulate"]} parts' if result['accumulate'] > 1 else ''
    model = result['model']
    layers = 'scanned' if model['scan'] else 'unrolled'
    page.say(
        f'batch {result["batch"]} ({result["per_device_batch"]:g} clips a device{parts}), '
        f'{model["compute_dtype"]}, attention {model["attention"]}, remat {model["remat"]}, '
        f'layers {layers}\n'
    )


def _show_parameters(page: _Page, parameters: Mapping[str, Any]) -> None:
    frozen = parameters['total'] - parameters['trained']
    rows = [
        ['trained', _amount(parameters['trained'], 1e6)],
        ['frozen', _amount(frozen, 1e6)],
        ['optimizer slots', _amount(parameters['optimizer_slots'], 1e6)],
    ]
    page.show('Parameters', ['', 'millions'], rows)


def _show_flops(page: _Page, flops: Mapping[str, Any]) -> None:
    rows = []
    for name, counts in flops['forward_per_clip'].items():
        needed, all_tokens = counts['needed'], counts['all_tokens']
        # needed: the last layer for the aggregate token only; all_tokens: as published counts.
        rows.append([f'forward {name}', _amount(needed, 1e9), _amount(all_tokens, 1e9)])
    total = flops['model_per_clip']
    needed, all_tokens = total['needed'], total['all_tokens']
    rows.append(['forward and backward', _amount(needed, 1e9), _amount(all_tokens, 1e9)])
    page.show('FLOPs of one clip', ['', 'GFLOP needed', 'all tokens in all layers'], rows)


def _show_memory(page: _Page, memory: Mapping[str, Any]) -> None:
    # In the order of the rows: state and batch make up the arguments; arguments, temporaries and
    # outputs (not shown) the peak.
    labels = {
        'state': 'parameters, optimizer, statistics',
        'objective': 'of it memories of the objective',
        'batch': 'batch',
        'arguments': 'arguments',
        'temporaries': 'temporaries',
        'peak': 'peak',
        'limit': 'there is',
    }
    # Three values: unknown is not the same as too large.
    verdict = {True: 'fits', False: 'DOES NOT FIT', None: 'unknown'}[memory['fits']]
    # 1e9 bytes, not GiB: as on data sheets.
    if not memory['objective']:
        del labels['objective']
    rows = [[label, _amount(memory[field], 1e9)] for field, label in labels.items()]
    page.show('Memory of one device', ['', 'GB'], [*rows, ['', verdict]])
    # Plans that were stored before there were any lack it.
    if memory.get('host_tables'):
        amount = _amount(memory['host_tables'], 1e9)
        page.say(f'each host keeps tables of the objective: {amount} GB, mapped from its disk')
    for advice in memory.get('would_fit', ()):
        page.say(f'would fit, by estimate: {advice}')


def _show_collectives(page: _Page, collectives: Sequence[Mapping[str, Any]]) -> None:
    if not collectives:
        return
    rows = []
    for collective in collectives:
        rows.append(
            [
                collective['kind'],
                str(collective['group']),
                f'{collective["count"]:g}',
                _amount(collective['bytes'], 1e6),
                _amount(collective['received'], 1e6),
            ]
        )
    columns = ['', 'devices', 'times', 'MB', 'MB received by each']
    page.show('Collectives of one step', columns, rows)


def _show_roofline(page: _Page, result: Mapping[str, Any]) -> None:
    roofline, flops = result['roofline'], result['flops']
    rates = roofline['rates']
    executed = flops.get('executed_step')
    # Devices that the mesh uses, not all that there are.
    num_devices = math.prod(result['mesh'].values())
    work = (executed or flops['model_step']) / num_devices
    if work > 1e11:
        compute = f'{_amount(work, 1e12)} TFLOP'
    else:
        compute = f'{_amount(work, 1e9)} GFLOP'
    if not executed:
        # Nothing was traced, and the model's own FLOPs stand in.
        compute += ' (without recomputation)'

    # The peak is a chip's, and the table one of a device.
    device_peak = 'unknown'
    if rates['peak']:
        peak = rates['peak'] / result['devices'] * result['chips']
        device_peak = f'{peak / 1e12:.0f} TFLOP/s'
    amounts = {'compute': compute}
    speeds = {'compute': device_peak}
    # memory, links and network, whose rates are a device's already.
    for resource, moved in roofline['bytes'].items():
        amounts[resource] = 'unknown' if moved is None else f'{_amount(moved, 1e9)} GB'
        rate = rates[resource]
        speeds[resource] = f'{_amount(rate, 1e9)} GB/s' if rate else 'unknown'

    rows = []
    for resource, seconds in roofline['seconds'].items():
        rows.append([resource, amounts[resource], speeds[resource], _amount(seconds, 1e-3)])
    page.show('Roofline of one device and step', ['', 'amount', 'rate', 'ms'], rows)


def _show_bound(page: _Page, result: Mapping[str, Any]) -> None:
    # In brackets: if nothing overlapped. The truth lies between the two, see plan.py.
    roofline, host, run = result['roofline'], result['host'], result['run']
    page.say(
        f'bound: {1e3 * roofline["bound"]:.1f} ms a step by {roofline["limited_by"]} '
        f'({1e3 * roofline["serial"]:.1f} ms if nothing overlapped): '
        f'{roofline["clips_per_s"]:.0f} clips/s, {roofline["clips_per_s_per_chip"]:.1f} a chip, '
        f'MFU {100 * roofline["mfu"]:.1f} % ({100 * roofline["mfu_serial"]:.1f} %)'
    )
    page.say(
        # What input pipelines must deliver for the bound to be reached.
        f'each of {result["hosts"]} hosts: {host["clips_per_s"]:.0f} clips/s, '
        f'{host["frames_per_s"]:.0f} frames/s to decode, '
        f'{host["bytes_per_s"] / 1e9:.2f} GB/s to its devices'
    )
    page.say(
        f'{result["steps"]} steps: {run["hours"]:.1f} hours, {run["chip_hours"]:.0f} chip-hours, '
        'at the bound'
    )
