"""docs/machines.md is what the tables say."""

from scripts.write_machines_doc import TARGET, document, machines


def test_the_page_is_up_to_date() -> None:
    assert TARGET.read_text() == document()


def test_every_state_can_be_reached_and_every_machine_ends() -> None:
    for machine in machines():
        reached = {machine.first}
        for _ in machine.rows:
            reached |= {after for state, _, after in machine.rows if state in reached}
        named = {name for state, _, after in machine.rows for name in (state, after)}
        assert reached == named, machine.title
        ends = {after for _, _, after in machine.rows} - {state for state, _, _ in machine.rows}
        assert ends, machine.title
        ending = set(ends)
        for _ in machine.rows:
            ending |= {state for state, _, after in machine.rows if after in ending}
        assert ending == named, machine.title
