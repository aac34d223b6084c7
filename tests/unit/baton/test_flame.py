"""`scripts/flame.py`: the thread of the loop alone, functions joined, small frames left out."""

from xml.etree import ElementTree

from scripts.flame import draw, read

LOOP = "main (baton/main.py:1);Runner.run (asyncio/runners.py:9)"


def test_stacks_of_the_loop_become_boxes_as_wide_as_their_share() -> None:
    root = read(
        [
            f"{LOOP};feed (router/dispatch.py:10) 30\n",
            f"{LOOP};feed (router/dispatch.py:12);handle (router/scheduling/scheduler.py:3) 69\n",
            f"{LOOP};rare (x/y.py:1) 0\n",
            f"{LOOP} 1\n",
            "other thread (z.py:1) 1000\n",
        ]
    )
    assert root.count == 100
    drawn = ElementTree.fromstring(draw(root, "a <title>"))
    titles = [title.text for title in drawn.iter("{http://www.w3.org/2000/svg}title")]
    assert titles == [
        "the loop: 100.0%",
        "feed (router/dispatch.py): 99.0%",
        "handle (router/scheduling/scheduler.py): 69.0%",
    ]
