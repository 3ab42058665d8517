"""Puts the pruned network of a finished run into the zoo, with its model card.

python -m experiments.zoo --workdir=runs/frontier_lenet300/120-0 --name=lenet300
"""

import dataclasses
import json
from pathlib import Path

import dns_jax
from dns_jax.files.sparse import load_sparse
from dns_jax.files.writing import write_whole
from experiments.artefacts.loading import weights_of
from experiments.config import command_line
from experiments.config.command_line import flag
from experiments.reports import run_report as report
from experiments.reports.records import SUMMARY_FILE
from experiments.reports.summaries import read_whole_summary
from experiments.training.workdir import NETWORK_FILE

FOLDER = Path(__file__).parents[1] / 'zoo'


@dataclasses.dataclass(frozen=True)
class ZooConfig:
    """What `experiments.zoo` publishes."""

    workdir: str = flag('runs/latest', 'Folder of the finished run.')
    name: str = flag('', 'Name of the network in the zoo, as that of its files; must be given.')

    def __post_init__(self):
        if not self.name.isidentifier():
            raise ValueError(f'--name={self.name!r} must be letters, digits and underscores')


def publish(config: ZooConfig) -> list[Path]:
    """Writes `NAME.safetensors`, `NAME.json`, the run's summary, and `NAME.md`, its card.

    Returns:
      The paths of the three.

    Raises:
      ValueError: if the run's network or summary is damaged, or they are of different runs.
      OSError: if the run is not finished, or the zoo cannot be written.
    """
    run = Path(config.workdir)
    summary = read_whole_summary(run / SUMMARY_FILE)
    # Folders of this machine mean nothing to others; the name of a Caffe file does.
    reference = Path(str(summary.get('flags', {}).pop('reference', None) or ''))
    if reference.suffix == '.caffemodel':
        summary['flags']['reference'] = reference.name
    card = report.card(summary)
    params, masks, _ = load_sparse(run / NETWORK_FILE)
    kept = dns_jax.measure_sizes(weights_of(params), weights_of(masks)).total.kept
    if kept != summary['kept']:
        raise ValueError(
            f'--workdir={run}: pruned.safetensors keeps {kept} parameters, summary.json says '
            f'{summary["kept"]}'
        )
    FOLDER.mkdir(exist_ok=True)
    paths = [FOLDER / f'{config.name}.{end}' for end in ('safetensors', 'json', 'md')]
    write_whole(paths[0], (run / NETWORK_FILE).read_bytes())
    write_whole(paths[1], json.dumps(summary, indent=2) + '\n')
    write_whole(paths[2], card)
    command_line.print_result([str(path) for path in paths])
    return paths


if __name__ == '__main__':
    command_line.launch({}, publish, ZooConfig)
