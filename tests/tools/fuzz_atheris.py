"""Fuzzes one reader with atheris, guided by which lines of the project an input reaches.

python tests/tools/fuzz_atheris.py READER [OPTIONS]

READER is a name of `tests/helpers/readers.py`, such as 'coded files'; without one it prints all.
OPTIONS are libFuzzer's, such as -max_total_time=60, without which it goes on until it finds an
input that crashes the reader: one by which it raises what it does not document, takes over 20
seconds or over 4 GiB. Inputs that reach something new are kept in runs/fuzz/READER/corpus, which
begins with the valid ones and with which the next call goes on; what crashes is put beside it, and
is tried again by naming it in the place of options. Needs the extra `fuzz`.
"""

import contextlib
import sys
import warnings
from pathlib import Path


def main():
    import atheris  # here, for pytest imports this file where there is none

    root = Path(__file__).resolve().parents[2]
    sys.path[:0] = [str(root), str(root / 'tests' / 'helpers')]
    with atheris.instrument_imports(include=['dns_jax', 'experiments']):
        from readers import READERS
    name, *options = sys.argv[1:] or ['']
    if name not in READERS:
        raise SystemExit(f'{name!r} is no reader; these are:\n' + '\n'.join(READERS))
    folder = Path('runs/fuzz') / name.replace(' ', '_').replace(',', '')
    scratch, corpus = folder / 'scratch', folder / 'corpus'
    for each in (scratch, corpus):
        each.mkdir(parents=True, exist_ok=True)
    reader = READERS[name](scratch.resolve())
    for number, seed in enumerate(reader.seeds):
        (corpus / f'seed-{number}').write_bytes(seed)
    warnings.simplefilter('error')

    def read(data):
        with contextlib.suppress(reader.errors):
            reader.read(data)

    limits = '-timeout=20', '-rss_limit_mb=4096', f'-artifact_prefix={folder}/'
    inputs = [] if any(Path(option).is_file() for option in options) else [str(corpus)]
    atheris.Setup([sys.argv[0], *limits, *options, *inputs], read)
    atheris.Fuzz()


if __name__ == '__main__':
    main()
