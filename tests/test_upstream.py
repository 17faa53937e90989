"""What ``make upstream`` tells of a run of the conformance suite."""

from __future__ import annotations

from pathlib import Path

from tests.upstream import NO_FAMILY, family_of, outcomes, table

REPORT = """<testsuites><testsuite>
<testcase classname="tests.conformance.test_reads" name="test_reads[llama-single]"/>
<testcase classname="tests.conformance.test_reads" name="test_reads[gpt2-single]"><failure>no</failure></testcase>
<testcase classname="tests.conformance.test_reads" name="test_reads[gpt2-ragged]"><error>no</error></testcase>
<testcase classname="tests.conformance.test_reads" name="test_writes[resid_post-qwen3]"><skipped/></testcase>
<testcase classname="tests.conformance.test_reads" name="test_alone"/>
</testsuite></testsuites>"""


def test_families_are_told_apart(tmp_path: Path) -> None:
    report = tmp_path / "report.xml"
    report.write_text(REPORT)
    found = outcomes(report)
    assert {name: (each.passed, len(each.failed), each.skipped) for name, each in found.items()} == {
        "llama": (1, 0, 0),
        "gpt2": (0, 2, 0),
        "qwen3": (0, 0, 1),
        NO_FAMILY: (1, 0, 0),
    }
    lines = table(found).splitlines()
    assert lines[0].split()[:2] == ["CHANGED", "gpt2"]
    assert lines[1].strip() == "tests.conformance.test_reads::test_reads[gpt2-single]"
    assert [line.split()[0] for line in lines[3:]] == ["same"] * 3


def test_the_longest_name_counts() -> None:
    assert family_of("test_reads[llama_bias-single]") == "llama_bias"
    assert family_of("test_reads") == NO_FAMILY
