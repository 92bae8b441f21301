"""What a job reports: before it starts, while it runs, and at its end."""

from __future__ import annotations

import dataclasses


@dataclasses.dataclass(frozen=True)
class Summary:
    """What a job did.

    Attributes:
        num_records: records of this job's part that are done, earlier runs included.
        num_earlier: those of them that an earlier run had done.
        num_bad: those of them that were refused, earlier runs included.
        seconds: time this run took, loading not included.
        rate: records per second of this run.
        padding: part of the batches that was padding, 0 to 1; stacks and lists of texts have none.
        stages: seconds by stage, summed over its workers; on the lanes without waiting for them.
        lanes: part of the time each lane was busy, 0 to 1.
        files: shards with outputs in the output folder.
        error_files: files there with bad records.
        passed_over: files in input folders that no reader takes, by suffix.
        num_tokens: tokens that this run generated.
        token_rate: tokens per second of this run.
    """

    num_records: int
    num_earlier: int
    num_bad: int
    seconds: float
    rate: float
    padding: float
    stages: dict[str, float]
    lanes: dict[str, float]
    files: int
    output: str
    error_files: int = 0
    passed_over: dict[str, int] = dataclasses.field(default_factory=dict)
    num_tokens: int = 0
    token_rate: float = 0.0


@dataclasses.dataclass(frozen=True)
class Plan:
    """What a job would do, found out without writing anything.

    Attributes:
        num_records: records in the input, None when that is not known.
        devices: names of the lanes.
        columns: output columns of the first batch with type and shape, empty for an empty input.
        num_tried: records in the first batch.
        num_earlier: records that a resumed job finds done.
    """

    input_format: str
    num_files: int
    num_records: int | None
    devices: tuple[str, ...]
    columns: dict[str, str]
    num_tried: int
    num_earlier: int = 0
