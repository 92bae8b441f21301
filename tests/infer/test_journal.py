"""The journal distinguishes whole entries from damaged ones, whatever happened to the file."""

from __future__ import annotations

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from asyncdp.errors import ResumeRefusedError
from asyncdp.infer.output.journal import JOURNAL_NAME, Block, Journal, JournalState, StoredFile, load_journal

FINGERPRINT = {"model": "a:b", "shard": [0, 1]}


def block(index):
    return Block(index, 10, index % 2, (StoredFile(f"part-{index:06d}.parquet", 100 + index, "ab" * 16),))


@pytest.fixture
def folder(tmp_path):
    """A folder whose journal names four blocks and the end."""
    journal = Journal(tmp_path, JournalState(FINGERPRINT))
    for index in range(4):
        journal.finish_block(block(index))
    journal.finish_input(40)
    return tmp_path


def test_a_journal_reads_back(folder):
    """What was written is what is read."""
    state = load_journal(folder)
    assert state.fingerprint == FINGERPRINT
    assert state.blocks == {index: block(index) for index in range(4)}
    assert state.num_records == 40


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(start=st.integers(0, 900), length=st.integers(1, 300), filling=st.binary(max_size=40))
def test_damage_never_invents_a_block(folder, start, length, filling):
    """After any damage the blocks read are some of those written, unchanged, or the folder is refused."""
    path = folder / JOURNAL_NAME
    whole = path.read_bytes()
    path.write_bytes(whole[:start] + filling + whole[start + length :])
    try:
        state = load_journal(folder)
    except ResumeRefusedError as error:
        text = str(error)
        assert "damaged" in text
    else:
        assert all(state.blocks[index] == block(index) for index in state.blocks)
        assert state.num_records in (None, 40)
    finally:
        path.write_bytes(whole)


def test_names_in_a_journal_stay_in_the_folder():
    """An entry whose file lies elsewhere is refused, should anybody write one."""
    entry = block(0).to_json()
    entry["files"] = [{"name": "../../etc/passwd", "num_bytes": 1, "digest": "x"}]
    with pytest.raises(ValueError, match="is no file name"):
        Block.from_json(entry)


def test_a_folder_without_a_journal(tmp_path):
    """A folder with other files is never continued in."""
    with pytest.raises(ResumeRefusedError, match="no journal of a job"):
        load_journal(tmp_path)
