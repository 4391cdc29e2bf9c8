"""The tables of stages: made of reports, and those that are committed."""

import stages

REPORT = """<testsuites><testsuite>
<testcase name="a"><properties><property name="stage" value="op|xla|oracle|H=64"/>
<property name="jax" value="0.11.2"/></properties></testcase>
<testcase name="b"><properties><property name="stage" value="op|xla|oracle|H=64"/>
<property name="jax" value="0.11.2"/></properties>{b}</testcase>
<testcase name="c"><properties><property name="stage" value="op|xla|oracle|H=128"/>
<property name="jax" value="0.9"/></properties><skipped/></testcase>
<testcase name="d"/></testsuite></testsuites>"""


def test_a_case_passed_where_all_its_tests_did(tmp_path):
    path = tmp_path / "report.xml"
    path.write_text(REPORT.format(b=""))
    # What was skipped here, for want of a compiler, may have passed elsewhere.
    before = [["op", "xla", "oracle", "H=128", ["0.9"]]]
    rows = stages.merged(before, stages.read([path]))
    assert rows == [["op", "xla", "oracle", "H=64", ["0.11.2"]], *before]
    path.write_text(REPORT.format(b="<failure/>"))
    assert stages.merged(rows, stages.read([path])) == before
    assert "| xla | equals float64 | H=128 | passed |\n" in stages.table(rows[1:], "op")
    assert "| op | xla | 1 on 0.9, 1 on 0.11.2 | no |" in stages.summary(rows)


def test_the_committed_tables_are_those_of_the_record():
    for path, text in stages.pages(stages.load()).items():
        assert path.read_text() == text, f"{path} is not what stages.py writes"


def test_every_case_is_in_the_record(request):
    """A new case, or one of another name, has to have passed somewhere."""
    marked = [stages.case(item) for item in request.session.items]
    cases = {case for case in marked if case is not None}
    known = {tuple(row[:4]) for row in stages.load()}
    assert cases <= known, sorted(cases - known)
