"""Parts that jobs of a scheduler work on, in any order and over again, and what joins them."""

from pathlib import Path
from typing import Any

import pytest
from support.prepared import all_stages, corpus_of_all_kinds, same_files

from megatron_sep.config.prepare import PrepareConfig
from megatron_sep.config.schema import TokenizerConfig
from megatron_sep.prepare.jobs import merge, read_part, work_on
from megatron_sep.prepare.prepare import prepare
from megatron_sep.prepare.receipt import PrepareError
from megatron_sep.prepare.work_folder import part_at_work, whole_at_work


@pytest.fixture
def settings(tmp_path: Path, tokenizer_path: Path) -> dict[str, Any]:
    pytest.importorskip("rensa")
    sources = corpus_of_all_kinds(tmp_path)
    tokenizer = TokenizerConfig(path=tokenizer_path)
    return {"tokenizer": tokenizer, "sources": sources, "workers": 1, **all_stages(tmp_path, sources)}


def test_jobs_make_the_bytes_of_one_process(tmp_path: Path, settings: dict[str, Any]) -> None:
    """Parts in any order, some of them twice; nothing is merged before all are there, and who is missing is named."""
    prepare(PrepareConfig(output=tmp_path / "whole", **settings))
    config = PrepareConfig(output=tmp_path / "jobs", **settings)
    with pytest.raises(PrepareError, match="no part of it is begun"):
        merge(config)
    assert "scanned" in work_on(config, 2, 3)
    with pytest.raises(PrepareError, match=r"of 3 parts 1, 2 are not through with `scan`.*--part i/3"):
        merge(config)
    assert "scanned" in work_on(config, 0, 3)
    assert "scanned" in work_on(config, 0, 3)
    assert "scanned" in work_on(config, 1, 3)
    assert "run each of the 3 parts again" in merge(config)
    for part in (1, 0, 1, 2):
        assert "encoded" in work_on(config, part, 3)
    assert "documents" in merge(config)
    assert "documents" in work_on(config, 1, 3)
    assert "documents" in merge(config)
    same_files(tmp_path / "whole", tmp_path / "jobs")


def test_other_parts_and_settings_are_refused(tmp_path: Path, settings: dict[str, Any]) -> None:
    """Parts of another number do not fit between those that were begun; one process goes on with what there is."""
    config = PrepareConfig(output=tmp_path / "jobs", **settings)
    work_on(config, 0, 3)
    with pytest.raises(PrepareError, match=r"holds work of other settings or text \(parts\)"):
        work_on(config, 1, 4)
    with pytest.raises(PrepareError, match=r"\(shuffle\)"):
        work_on(config.model_copy(update={"shuffle": False}), 1, 3)
    prepare(config)
    prepare(PrepareConfig(output=tmp_path / "whole", **settings))
    same_files(tmp_path / "whole", tmp_path / "jobs")


def test_two_at_the_same_time_are_refused(tmp_path: Path) -> None:
    """Parts work side by side; the same part twice does not, nor does the whole beside a part."""
    output = tmp_path / "out"
    with part_at_work(output, {}, 0, 2), part_at_work(output, {}, 1, 2):
        twice = part_at_work(output, {}, 1, 2)
        with pytest.raises(PrepareError, match=r"another process is at work there \(part-00001\.lock\)"), twice:
            pass
        with pytest.raises(PrepareError, match=r"at work there \(lock\)"), whole_at_work(output, {}, 2):
            pass


def test_who_comes_second_changes_no_settings_of_the_first(tmp_path: Path) -> None:
    """Also before that one has done anything; where it is gone and has done nothing, others may begin."""
    output = tmp_path / "out"
    with part_at_work(output, {"seed": 1}, 0, 2):
        other = part_at_work(output, {"seed": 2}, 1, 2)
        with pytest.raises(PrepareError, match=r"holds work of other settings or text \(seed\)"), other:
            pass
        with part_at_work(output, {"seed": 1}, 1, 2):
            pass
    with part_at_work(output, {"seed": 2}, 1, 2):
        pass


@pytest.mark.parametrize("text", ["0/4", "5/4", "4", "a/b", "1/0", "-1/2"])
def test_what_is_no_part_is_refused(text: str) -> None:
    """With the way to write one."""
    with pytest.raises(PrepareError, match=r"is no part; give its number, from 1, .* as in 3/8"):
        read_part(text)
