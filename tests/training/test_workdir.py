"""Tests of training.workdir and dns_jax.files.writing: who owns a folder, and what is written."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from dns_jax.files.writing import write_whole
from experiments.config.command_line import identify
from experiments.reports.records import METRICS_FILE
from experiments.training import workdir
from experiments.training.flags import Config
from experiments.training.workdir import FLAGS_FILE, LOCK_FILE, Records, release


def config(folder, **fields):
    return Config(**{'network': 'lenet300', 'c_rate': '1', 'workdir': str(folder), **fields})


def claim(config):
    """Claims the folder of a run, and returns it."""
    folder = Path(config.workdir)
    workdir.claim(folder, identify(config), config.resume, config.overwrite)
    return folder


def record(phase, step, **more):
    return {'phase': phase, 'step': step, 'loss': 0.5, **more}


def lines_of(folder):
    return [json.loads(line) for line in (folder / METRICS_FILE).read_text().splitlines()]


@pytest.fixture
def run_folder(tmp_path):
    """A folder that holds a run with its default flags, and a file of its own."""
    folder = tmp_path / 'run'
    claim(config(folder))
    (folder / 'summary.json').write_text('{}')
    return folder


@pytest.fixture
def foreign_folder(tmp_path):
    folder = tmp_path / 'foreign'
    folder.mkdir()
    (folder / 'thesis.txt').write_text('years of work')
    return folder


@pytest.mark.parametrize('place', ['missing', 'deep/er/missing', 'empty'])
@pytest.mark.parametrize('switch', [{}, {'resume': True}, {'overwrite': True}])
def test_a_free_folder_is_claimed(tmp_path, place, switch):
    (tmp_path / 'empty').mkdir()
    wanted = config(tmp_path / place, **switch)
    folder = claim(wanted)
    assert folder == tmp_path / place
    assert json.loads((folder / FLAGS_FILE).read_text()) == identify(wanted)
    assert sorted(os.listdir(folder)) == [LOCK_FILE, FLAGS_FILE]


@pytest.mark.parametrize('fields', [{}, {'seed': 3}])
def test_a_folder_with_a_run_is_refused(run_folder, fields):
    with pytest.raises(ValueError, match=r'--workdir=.*run already holds .* --resume.*--overwrite'):
        claim(config(run_folder, **fields))
    assert (run_folder / 'summary.json').exists()


def test_resume_keeps_the_run_and_may_change_places_and_switches(run_folder):
    before = (run_folder / FLAGS_FILE).read_text()
    changed = config(run_folder, resume=True, data_dir='a', manual_dir='b', tensorboard=True)
    assert claim(changed) == run_folder
    assert (run_folder / 'summary.json').exists()
    assert (run_folder / FLAGS_FILE).read_text() == before


def test_resume_with_other_flags_is_refused_and_names_them(run_folder):
    before = (run_folder / FLAGS_FILE).read_text()
    with pytest.raises(ValueError, match=r'other flags: c_rate was .1., is .2., seed was 0, is 3'):
        claim(config(run_folder, resume=True, seed=3, c_rate='2'))
    assert (run_folder / FLAGS_FILE).read_text() == before
    # There may have been more of them than there are now.
    (run_folder / FLAGS_FILE).write_text(json.dumps({**json.loads(before), 'bygone': 1}))
    with pytest.raises(ValueError, match='bygone was 1, is None'):
        claim(config(run_folder, resume=True))


@pytest.mark.parametrize('content', ['', '{"seed": ', '[]', 'null', '{"other": 1}'])
@pytest.mark.parametrize('switch', ['resume', 'overwrite'])
def test_damaged_flags_are_named_and_those_of_other_programs_stay(run_folder, content, switch):
    (run_folder / FLAGS_FILE).write_text(content)
    with pytest.raises(ValueError, match=r'flags\.json is damaged'):
        claim(config(run_folder, **{switch: True}))
    assert (run_folder / FLAGS_FILE).read_text() == content


def test_overwrite_deletes_the_run(run_folder):
    wanted = config(run_folder, overwrite=True, seed=3)
    claim(wanted)
    assert sorted(os.listdir(run_folder)) == [LOCK_FILE, FLAGS_FILE]
    assert json.loads((run_folder / FLAGS_FILE).read_text()) == identify(wanted)


@pytest.mark.parametrize('switch', [{}, {'resume': True}, {'overwrite': True}])
def test_a_folder_of_something_else_is_never_touched(foreign_folder, switch):
    with pytest.raises(ValueError, match='is not empty and holds no run'):
        claim(config(foreign_folder, **switch))
    assert os.listdir(foreign_folder) == ['thesis.txt']
    assert (foreign_folder / 'thesis.txt').read_text() == 'years of work'


# Tests may run as root, who may write anywhere but not below a regular file.
@pytest.mark.parametrize('below', ['', 'run', 'run/run'])
@pytest.mark.parametrize('switch', [{}, {'resume': True}, {'overwrite': True}])
def test_a_file_in_the_place_of_the_folder_is_refused(tmp_path, below, switch):
    (tmp_path / 'file').write_text('text')
    with pytest.raises(OSError, match=r'--workdir=.*file.* must be a folder that can be written'):
        claim(config(tmp_path / 'file' / below, **switch))
    assert (tmp_path / 'file').read_text() == 'text'


def test_records_are_appended_one_a_line(tmp_path):
    records = [record('reference', 1), record('surgery', 1, kept={'fc1': 3})]
    log = Records(tmp_path)
    assert lines_of(tmp_path) == []
    for one in records:
        log.append(one)
    assert lines_of(tmp_path) == records
    more = record('surgery', 2)
    Records(tmp_path).append(more)
    assert lines_of(tmp_path) == [*records, more]
    assert os.listdir(tmp_path) == [METRICS_FILE]


@pytest.mark.parametrize(
    ('phase', 'step', 'kept'),
    [
        ('surgery', 4, [('reference', 2), ('reference', 4), ('surgery', 2), ('surgery', 4)]),
        ('surgery', 3, [('reference', 2), ('reference', 4), ('surgery', 2)]),
        ('surgery', 0, [('reference', 2), ('reference', 4)]),
        ('reference', 2, [('reference', 2), ('surgery', 2), ('surgery', 4)]),
        ('reference', 9, [('reference', 2), ('reference', 4), ('surgery', 2), ('surgery', 4)]),
    ],
)
def test_rewind_drops_the_later_steps_of_one_phase(tmp_path, phase, step, kept):
    log = Records(tmp_path)
    for one in [('reference', 2), ('reference', 4), ('surgery', 2), ('surgery', 4)]:
        log.append(record(*one))
    before = (tmp_path / METRICS_FILE).read_text().splitlines()
    log.rewind(phase, step)
    after = (tmp_path / METRICS_FILE).read_text()
    assert [(one['phase'], one['step']) for one in lines_of(tmp_path)] == kept
    # Bit for bit: what is kept is not written anew in other words.
    assert set(after.splitlines()) <= set(before)
    assert not after or after.endswith('\n')


@pytest.mark.parametrize('torn', ['{"phase": "surg', json.dumps(record('surgery', 1)), '\\'])
def test_rewind_drops_a_torn_last_line(tmp_path, torn):
    log = Records(tmp_path)
    log.append(record('reference', 2))
    whole = (tmp_path / METRICS_FILE).read_text()
    (tmp_path / METRICS_FILE).write_text(whole + torn)
    log.rewind('surgery', 5)
    assert (tmp_path / METRICS_FILE).read_text() == whole


@pytest.mark.parametrize('damage', ['{"phase": "surg', '[]', '{"step": 1}', '{"phase": "surgery"}'])
def test_a_damaged_line_is_named_and_nothing_is_dropped(tmp_path, damage):
    log = Records(tmp_path)
    log.append(record('reference', 2))
    content = (tmp_path / METRICS_FILE).read_text() + damage + '\n'
    (tmp_path / METRICS_FILE).write_text(content)
    with pytest.raises(ValueError, match=r'metrics\.jsonl, line 2, is damaged'):
        log.rewind('surgery', 5)
    assert (tmp_path / METRICS_FILE).read_text() == content


def read_events(folder):
    """Returns {tag: [(step, value), …]} of the TensorBoard events in a folder."""
    from tensorboardX import proto
    from tensorboardX.record_writer import masked_crc32c

    scalars = {}
    for path in folder.iterdir():
        content = path.read_bytes()
        while content:
            length = int.from_bytes(content[:8], 'little')
            assert content[8:12] == masked_crc32c(content[:8]).to_bytes(4, 'little')
            event = proto.event_pb2.Event.FromString(content[12 : 12 + length])
            content = content[12 + length + 4 :]
            for value in event.summary.value:
                scalars.setdefault(value.tag, []).append((event.step, value.simple_value))
    return scalars


def test_events_for_tensorboard_hold_every_number(tmp_path):
    log = Records(tmp_path, tensorboard=True)
    for step in (1, 2):
        log.append(record('surgery', step, kept={'fc1': 10 * step, 'fc2': 7}, pruned={}))
    log._events.close()  # what a thread of the writer still holds; a run does so as it ends
    assert lines_of(tmp_path)[0] == record('surgery', 1, kept={'fc1': 10, 'fc2': 7}, pruned={})
    assert read_events(tmp_path / 'tensorboard') == {
        'surgery/loss': [(1, 0.5), (2, 0.5)],
        'surgery/kept/fc1': [(1, 10), (2, 20)],
        'surgery/kept/fc2': [(1, 7), (2, 7)],
    }


def test_missing_tensorboardx_is_named(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, 'tensorboardX', None)
    with pytest.raises(ValueError, match='--tensorboard needs the package tensorboardX'):
        Records(tmp_path, tensorboard=True)
    Records(tmp_path).append(record('surgery', 1))


@pytest.mark.parametrize(
    ('content', 'expected'), [('µ\n', b'\xc2\xb5\n'), (b'\x00\xff', b'\x00\xff'), ('', b'')]
)
def test_write_whole_writes_and_replaces(tmp_path, content, expected):
    path = tmp_path / 'file'
    for _ in range(2):
        write_whole(path, content)
        assert path.read_bytes() == expected
        assert os.listdir(tmp_path) == ['file']
        path.write_text('what was there before')


def test_write_whole_that_fails_names_the_file(tmp_path, monkeypatch):
    def fail(*arguments):
        raise OSError(28, 'No space left on device')

    with monkeypatch.context() as patch:
        patch.setattr(os, 'fsync', fail)
        with pytest.raises(OSError, match='No space left on device') as caught:
            write_whole(tmp_path / 'file', 'new')
    assert caught.value.filename == str(tmp_path / 'file')


def test_write_whole_into_a_missing_folder_names_the_file(tmp_path):
    with pytest.raises(FileNotFoundError, match='missing/file'):
        write_whole(tmp_path / 'missing' / 'file', 'new')
    assert os.listdir(tmp_path) == []


LOCK = (
    'import os, sys; os.lockf(os.open(sys.argv[1], os.O_RDWR), os.F_TLOCK, 0); '
    'print(flush=True); sys.stdin.read()'
)


def start_to_lock(folder):
    """Another process that locks a folder, until its input ends."""
    command, pipe = [sys.executable, '-c', LOCK, folder / LOCK_FILE], subprocess.PIPE
    return subprocess.Popen(command, stdin=pipe, stdout=pipe, stderr=pipe)


def is_free(folder):
    process = start_to_lock(folder)
    process.communicate()
    return process.returncode == 0


def test_two_processes_do_not_share_a_folder(tmp_path, compat):
    compat('faults', 'two runs in one folder at once', 'the second is refused, nothing lost')
    wanted = config(tmp_path / 'run', resume=True)
    folder = claim(wanted)
    assert not is_free(folder)
    release(folder)
    assert is_free(folder)
    with start_to_lock(folder) as other:
        other.stdout.readline()
        for switch in ('resume', 'overwrite'):
            with pytest.raises(BlockingIOError, match=r'=.*run is in use by another process'):
                claim(config(folder, **{switch: True}))
        assert (folder / FLAGS_FILE).exists()
        other.kill()
    # The lock died with its holder; the same process may claim twice.
    assert claim(wanted) == claim(wanted) == folder
    assert not is_free(folder)
