"""Several routers' pages as one."""

import asyncio
import tempfile
from pathlib import Path

import pytest
from aiohttp import web
from prometheus_client import CollectorRegistry, Counter, Gauge, generate_latest
from prometheus_client.parser import text_string_to_metric_families

from router import parent
from router.family import OWN, Family, labelled, merged
from router.series import Histogram


def page(number: int, *, extra: bool = False) -> str:
    registry = CollectorRegistry()
    Counter("asked", 'With "marks" and\nlines.', ["path"], registry=registry).labels(
        'a"b{c} d\n'
    ).inc(number)
    Gauge("open", "Now.", registry=registry).set(number)
    times = Histogram("took_seconds", "A time.", [], buckets=(1, 2), registry=registry)
    times.of().observe(number)
    if extra:
        Gauge("only_here", "Of one.", registry=registry).set(7)
    return generate_latest(registry).decode()


def test_merged_pages_have_each_family_once_and_every_sample_with_its_router() -> None:
    text = merged([labelled(page(1), "r-1"), labelled(page(2, extra=True), "r-2")])
    families = {family.name: family for family in text_string_to_metric_families(text)}
    names = sorted(name for name in families if not name.endswith("_created"))
    assert names == ["asked", "only_here", "open", "took_seconds"]
    assert text.count("# TYPE ") == len(families)
    found = {
        (sample.name, sample.labels["router"], sample.labels.get("le", "")): sample.value
        for family in families.values()
        for sample in family.samples
        if not sample.name.endswith("_created")
    }
    assert found["asked_total", "r-1", ""] == 1
    assert found["asked_total", "r-2", ""] == 2
    assert found["open", "r-2", ""] == 2
    assert found["only_here", "r-2", ""] == 7
    assert found["took_seconds_bucket", "r-1", "1.0"] == 1
    assert found["took_seconds_bucket", "r-2", "1.0"] == 0
    [asked, *_] = families["asked"].samples
    assert asked.labels["path"] == 'a"b{c} d\n'


def test_without_a_place_for_sockets_each_answers_for_itself(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "absent"))
    assert parent._make_folder() == ""
    assert "each router answers for itself alone" in caplog.text


async def test_others_are_asked_and_what_is_no_answer_is_left_out(tmp_path: Path) -> None:
    seen: list[tuple[str, str]] = []

    async def answer(request: web.Request) -> web.Response:
        seen.append((request.path_qs, request.headers.get("Authorization", "")))
        assert OWN in request.headers
        return web.Response(text="hello" * 50_000)

    app = web.Application()
    app.add_routes([web.get("/metrics", answer)])
    runner = web.AppRunner(app)
    await runner.setup()
    await web.UnixSite(runner, str(tmp_path / "1.sock")).start()
    process = await asyncio.create_subprocess_exec("true")
    await process.wait()
    killed = tmp_path / f"{process.pid}.sock"
    server = await asyncio.start_unix_server(lambda _r, _w: None, killed)
    server.close()
    killed.touch()
    family = Family(tmp_path)
    family.socket.touch()  # ours is not asked
    try:
        headers = {"Authorization": "Bearer k", "Cookie": "c"}
        assert await family.ask("/metrics?x=1", headers) == [b"hello" * 50_000]
        assert seen == [("/metrics?x=1", "Bearer k")]
        assert not killed.exists()
        assert await family.ask("/nothing", {}) == []
        family.leave()
        assert not family.socket.exists()
    finally:
        await runner.cleanup()
