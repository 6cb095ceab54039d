"""What a run looks like on a terminal: its bytes go through a terminal emulator, and the screen is looked at."""

import contextlib
import re

import pexpect
import pyte
import pytest
import synthetic_release
from conftest import DriveWorkspace
from fake_drive import FakeDrive

SUBJECTS = ["0018", "0019"]
BAR = re.compile(r"\d+ ?%")


@pytest.fixture(scope="module")
def two_subjects(tmp_path_factory):
    """Two subjects, with a damaged picture, so that there is a warning; the second lacks s3_all."""
    folder = tmp_path_factory.mktemp("two")
    options = {"frames": 12, "size": (64, 76), "jpeg_bytes": 20_000, "distinct": 1, "cameras": (0, 25)}
    damaged = {(25, 1): "cut"}
    synthetic_release.write_subject(folder, "0018", performances=["s1_all", "s3_all"], damaged=damaged, **options)
    synthetic_release.write_subject(folder, "0019", performances=["s1_all"], **options)
    return folder


class Terminal:
    """A run on an emulated terminal. `looks` are the screens on the way, as lists of rows; `rows` is all at the end."""

    def __init__(self, workspace, columns, interrupt_at=None):
        """interrupt_at: the text on the screen at which Ctrl-C is typed."""
        self.columns, self.looks = columns, []
        screen = pyte.HistoryScreen(columns, 24, history=10_000, ratio=1)
        stream = pyte.ByteStream(screen)
        command, *others = map(str, workspace.command())
        options = {"env": workspace.surroundings(None)["env"], "dimensions": (24, columns), "timeout": 120}
        child = pexpect.spawn(command, others, **options)
        while True:
            try:
                stream.feed(child.read_nonblocking(200))
            except pexpect.EOF:
                break
            self.looks.append([row.rstrip() for row in screen.display])
            if interrupt_at and any(interrupt_at in row for row in screen.display):
                child.sendintr()
                interrupt_at = None
        child.close()
        self.code = child.exitstatus
        scrolled = ["".join(line[column].data for column in range(columns)) for line in screen.history.top]
        self.rows = [row.rstrip() for row in [*scrolled, *screen.display]]
        self.cursor_column = screen.cursor.x

    @property
    def lines(self):
        """The rows at the end, those that fill the screen's width joined with the next."""
        lines = [""]
        for row in self.rows:
            lines[-1] += row
            if len(row) < self.columns:
                lines.append("")
        return lines


@contextlib.contextmanager
def slow_workspace(folder, release, bandwidth):
    """A workspace whose remote is so slow that the bars of a download are seen."""
    with FakeDrive(release, bandwidth=bandwidth) as drive:
        workspace = DriveWorkspace(folder / "work", drive)
        workspace.write_config(extraction={"subjects": SUBJECTS, "performances": ["s1_all", "s3_all"]})
        yield workspace


@pytest.fixture(scope="module", params=[80, 120])
def finished(request, tmp_path_factory, two_subjects):
    """A terminal of so many columns on which a run has come to its end; `logged` is what its log has."""
    with slow_workspace(tmp_path_factory.mktemp("terminal"), two_subjects, 400_000) as workspace:
        terminal = Terminal(workspace, request.param)
        terminal.logged = logged(workspace)
        return terminal


def logged(workspace):
    """The messages of the last run's log that are for the console too."""
    log = max((workspace.folder / "logs").iterdir()).read_text()
    return re.findall(r"^\S+ \S+ (?:INFO|WARNING|ERROR) +(\S.*)$", log, re.MULTILINE)


def test_a_run_has_its_bar_below_that_of_the_subject_and_leaves_whole_lines(finished):
    assert finished.code == 0, finished.rows
    pairs = [
        (above, below)
        for look in finished.looks
        for above, below in zip(look, look[1:])
        if BAR.search(above) and BAR.search(below)
    ]
    assert any("0018" in above and re.search(r"\b[12] ?(of|/) ?2\b", below) for above, below in pairs), pairs
    lines = finished.lines
    for message in finished.logged:
        assert any(line.endswith(message) for line in lines), (message, lines)
    assert not [line for line in lines if "█" in line or "%|" in line or "^" in line]
    assert finished.cursor_column == 0


def test_no_line_of_the_summary_is_wider_than_the_screen(finished):
    rows = finished.rows
    begin = max(n for n, row in enumerate(rows) if row.startswith("Summary"))
    end = next(n for n, row in enumerate(rows) if n > begin and row.startswith("The log is"))
    assert end - begin > 4 and all(len(row) < finished.columns for row in rows[begin:end]), rows[begin:end]


def test_no_bar_is_broken_in_two(finished):
    """The first part of a bar that is too wide would stay on the screen, once for each time that it is drawn."""
    for look in finished.looks:
        assert sum("|" in row and bool(BAR.search(row)) for row in look) <= 3, look


@pytest.mark.parametrize("columns", [80, 120])
def test_an_interrupted_run_leaves_no_piece_of_a_bar(tmp_path, two_subjects, columns):
    with slow_workspace(tmp_path, two_subjects, 20_000) as workspace:
        terminal = Terminal(workspace, columns, interrupt_at="%")
    assert terminal.code == 130
    assert not [row for row in terminal.rows if "█" in row or "%|" in row or "^" in row], terminal.rows
