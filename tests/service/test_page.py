"""The page at / and /docs in a real browser: with the mouse, with the keyboard, and while the service fails."""

from __future__ import annotations

import re
import shutil
import statistics
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
from harness import free_port
from prometheus_client.parser import text_string_to_metric_families

from service import lane
from service.admission import Ticket
from service.app import create_app
from service.keys import Keys
from service.page import OURS
from service.server import Server
from service.settings import Settings

KEY = "a-key-of-sixteen-letters"
LABELS = ("<b>bad</b>", "good")
IMAGE = "<img src=x onerror=\"document.title='broken in'\">"
CONTEXT = "Clara lives in Berkeley. The film is good."
PHONE = {"width": 320, "height": 640}
MAX_WEIGHT = 200_000


class Site:
    """A service in this process, so that a test can put it under load or lock it."""

    def __init__(self, models: Path) -> None:
        port = free_port()
        app = create_app(Settings(models=models, threads=1, port=port, grace_seconds=0, drain_seconds=1))
        self.url = f"http://127.0.0.1:{port}"
        self.service = app.state.service
        self.server = Server(app)
        self.thread = threading.Thread(target=self.server.run, daemon=True)

    def start(self) -> None:
        self.thread.start()
        deadline = time.monotonic() + 60
        while time.monotonic() < deadline:
            try:
                if httpx.get(self.url + "/readyz").status_code == 200:
                    return
            except httpx.TransportError:
                pass
            time.sleep(0.05)
        raise AssertionError("the service did not get ready")

    def end(self) -> None:
        self.server.should_exit = True
        self.thread.join(20)


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory, write_folder: Callable[..., Path]) -> Iterator[Site]:
    root = tmp_path_factory.mktemp("page")
    for variant in ("dense", "dsformer"):
        write_folder(root / f"classify-{variant}", "classify", variant, LABELS)
        write_folder(root / f"qa-{variant}", "qa", variant)
    made = Site(root)
    made.start()
    yield made
    made.end()


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    sync_api = pytest.importorskip("playwright.sync_api", reason="playwright is not installed: pip install '.[test]'")
    found = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
    with sync_api.sync_playwright() as playwright:
        own = playwright.chromium.executable_path
        if found is None and not Path(own).exists():
            pytest.skip("no Chromium: apt-get install chromium, or playwright install chromium")
        sync_api.expect.set_options(timeout=20_000)
        launched = playwright.chromium.launch(executable_path=found or own, args=["--no-sandbox"])
        yield launched
        launched.close()


class Visit:
    """A page, and what the browser had to say against it."""

    def __init__(self, browser: Any, url: str, **options: Any) -> None:
        self.context = browser.new_context(**options)
        self.page = self.context.new_page()
        self.complaints: list[str] = []
        self.elsewhere: list[str] = []
        self.page.on("console", lambda message: self._note(message))
        self.page.on("pageerror", lambda error: self.complaints.append(str(error)))
        self.page.on("request", lambda request: self._look(request.url, url))
        self.page.goto(url)

    def _note(self, message: Any) -> None:
        # Chromium writes this of every answer other than 2xx; the page shows the service's sentence.
        if message.type in ("error", "warning") and "Failed to load resource" not in message.text:
            self.complaints.append(message.text)

    def _look(self, asked: str, url: str) -> None:
        if not asked.startswith((url, "data:")):
            self.elsewhere.append(asked)

    def width(self) -> int:
        return int(self.page.evaluate("document.documentElement.scrollWidth"))


@pytest.fixture
def visit(browser: Any, site: Site) -> Iterator[Callable[..., Any]]:
    """Opens the page; at the end no error, no breach of the policy and no request elsewhere may have been seen."""
    visits = []

    def open_page(path: str = "/", **options: Any) -> Visit:
        made = Visit(browser, site.url + path, **options)
        visits.append(made)
        if path == "/":
            made.page.get_by_role("button", name="Praise").wait_for()
        return made

    yield open_page
    for each in visits:
        each.context.close()
        assert each.complaints == []
        assert [url for url in each.elsewhere if not url.startswith(site.url)] == []


def expect(locator: Any) -> Any:
    from playwright.sync_api import expect

    return expect(locator)


def ask(page: Any, question: str, context: str) -> Any:
    """Fill the form, compare, and give what the service said."""
    page.get_by_label("Ask a question").check()
    page.get_by_label("Question", exact=True).fill(question)
    page.get_by_label("Context", exact=True).fill(context)
    with page.expect_response("**/compare") as answered:
        page.get_by_role("button", name="Compare").click()
    expect(page.locator("article")).to_have_count(2)
    return answered.value.json()


def test_a_text_through_both_variants(visit: Callable[..., Any]) -> None:
    page = visit().page
    page.get_by_label("Text", exact=True).fill("the film is good")
    with page.expect_response("**/compare") as answered:
        page.get_by_role("button", name="Compare").click()
    said = answered.value.json()
    expect(page.locator("article")).to_have_count(2)
    for name, found in zip(("Dense", "DSFormer 2.8x"), said["variants"], strict=True):
        article = page.get_by_role("article", name=name)
        best = found["answer"][0]
        expect(article.locator(".answer")).to_have_text(best["label"])
        expect(article).to_contain_text(f"{100 * best['score']:.1f} %")
        expect(article).to_contain_text(f"{found['file_bytes'] / 1e6:.1f} MB")
        for stage in ("tokenize", "queue", "infer", "postprocess"):
            expect(article.locator(f"[data-stage={stage}]")).to_contain_text("ms")
    speed_up = said["variants"][1]["speed_up"]
    expect(page.get_by_role("status").first).to_contain_text(f"{speed_up['median']:.2f}× as fast as Dense")
    figures = page.locator("#figures")
    expect(figures).to_contain_text(f"95 % interval {speed_up['low']:.2f} to {speed_up['high']:.2f}, 20 rounds")
    expect(figures).to_contain_text("Same")


def test_the_stages_of_both_have_one_scale(visit: Callable[..., Any]) -> None:
    page = visit().page
    said = ask(page, "where does clara live", CONTEXT)
    longest = max(sum(each["stage_seconds"].values()) for each in said["variants"])
    for found, article in zip(said["variants"], page.locator("article").all(), strict=True):
        begins = 0.0
        for stage, seconds in found["stage_seconds"].items():
            bar = article.locator(f"[data-stage={stage}] i")
            shown = [
                float(bar.evaluate(f"bar => parseFloat(bar.style.{side})")) for side in ("insetInlineStart", "width")
            ]
            assert shown == pytest.approx([100 * begins / longest, 100 * seconds / longest], abs=0.01)
            begins += seconds


@pytest.mark.parametrize("context", [CONTEXT, "🎬🦄 " + CONTEXT, CONTEXT + " the film is bad. " * 60])
def test_the_answer_is_marked_where_it_stands(visit: Callable[..., Any], context: str) -> None:
    page = visit().page
    said = ask(page, "where does clara live", context)
    for found, article in zip(said["variants"], page.locator("article").all(), strict=True):
        answer = found["answer"]
        expect(article.locator("mark")).to_have_text(answer["answer"].strip())
        before = article.locator("mark").evaluate("mark => mark.previousSibling?.textContent ?? ''")
        assert len(before.encode("utf-16-le")) // 2 == answer["start"]
        assert article.get_by_role("region", name="Context").inner_text().strip() == context.strip()
        assert article.locator("mark").evaluate(
            """mark => {
                 const [line, box] = [mark, mark.parentElement].map(each => each.getBoundingClientRect());
                 return box.top <= line.top && line.bottom <= box.bottom + 2;
               }"""
        ), "the answer is scrolled out of its context"


def test_examples_are_one_click_away(visit: Callable[..., Any]) -> None:
    page = visit().page
    for task, field in (("Classify a text", "#text"), ("Ask a question", "#context")):
        page.get_by_label(task).check()
        for button in page.get_by_role("group", name="Examples").get_by_role("button").all():
            with page.expect_response("**/compare") as answered:
                button.click()
            expect(page.locator("article")).to_have_count(2)
            asked = answered.value.request.post_data_json["inputs"]
            assert page.locator(field).input_value() == (asked if field == "#text" else asked["context"])


def test_a_race_and_the_table_of_the_service(visit: Callable[..., Any]) -> None:
    page = visit().page
    page.get_by_label("Requests").select_option("20")
    timings: dict[str, list[float]] = {"dense": [], "dsformer": []}

    def note(response: Any) -> None:
        if found := re.search(r"/variants/(\w+)/classify", response.url):
            total = re.search(r"total;dur=([\d.]+)", response.headers["server-timing"])
            timings[found[1]].append(float(total[1]))

    page.on("response", note)
    page.get_by_role("button", name="Start race").click()
    expect(page.locator("#race-status")).to_contain_text("Finished")
    for name, variant in (("Dense", "dense"), ("DSFormer 2.8x", "dsformer")):
        shown = page.locator(f".contender[data-variant={variant}] strong").inner_text()
        assert float(shown.removesuffix(" ms")) == pytest.approx(
            statistics.median(timings[variant]), rel=0.02, abs=0.01
        )
        drawn = page.get_by_role("img", name=re.compile(f"^20 answers of {re.escape(name)}"))
        expect(drawn).to_be_visible()
        expect(drawn.locator("circle")).to_have_count(20)
    row = page.get_by_role("row", name="DSFormer 2.8x, classify")
    expect(row.get_by_role("cell").nth(0)).to_contain_text("ms")
    expect(row.get_by_role("cell").nth(2)).not_to_have_text("0.0")
    page.get_by_label("Requests").select_option("200")
    page.get_by_role("button", name="Start race").click()
    page.get_by_role("button", name="Stop race").click()
    expect(page.locator("#race-status")).to_contain_text("Stopped")


def test_no_text_becomes_html(visit: Callable[..., Any]) -> None:
    page = visit().page
    page.get_by_label("Text", exact=True).fill(IMAGE)
    page.get_by_role("button", name="Compare").click()
    expect(page.locator("article")).to_have_count(2)
    for label in LABELS:
        expect(page.get_by_text(label, exact=True).first).to_be_visible()
    ask(page, IMAGE, f"{IMAGE} {CONTEXT}")
    expect(page.get_by_role("region", name="Context").first).to_contain_text(IMAGE)
    assert page.locator("img, b").count() == 0
    assert page.title() == "DSFormer"


def test_a_model_that_comes_while_the_page_is_open(
    browser: Any, tmp_path: Path, write_folder: Callable[..., Path]
) -> None:
    write_folder(tmp_path / "one", "classify", "dense", LABELS)
    made = Site(tmp_path)
    made.start()
    opened = Visit(browser, made.url)
    row = opened.page.get_by_role("row", name="DSFormer 2.8x, classify")
    expect(opened.page.get_by_role("row", name="Dense, classify")).to_be_visible()
    expect(row).to_have_count(0)
    write_folder(tmp_path / "other", "classify", "dsformer", LABELS)
    expect(row).to_be_visible()
    assert httpx.post(made.url + "/variants/dsformer/classify", json={"inputs": "good"}).status_code == 200
    expect(row.get_by_role("cell").nth(0)).to_contain_text("ms")
    opened.page.get_by_role("button", name="Compare").click()
    expect(opened.page.locator("article")).to_have_count(2)
    opened.context.close()
    made.end()
    assert opened.complaints == []


# ------------------------------------------------------------------------------------------------ a service in trouble


def test_a_busy_service_is_a_sentence(visit: Callable[..., Any], site: Site, monkeypatch: pytest.MonkeyPatch) -> None:
    page = visit().page
    with monkeypatch.context() as patched:
        patched.setattr(site.service.lane, "inside", lane.MAX_COMPARISONS)
        page.get_by_role("button", name="Compare").click()
        expect(page.get_by_role("alert")).to_have_text(
            re.compile(r"^8 comparisons wait or run.* It asks to wait \d+ s\.$")
        )
        assert page.locator("article").count() == 0
    page.get_by_role("button", name="Compare").click()
    expect(page.locator("article")).to_have_count(2)
    expect(page.get_by_role("alert")).to_be_hidden()


def test_a_full_service_ends_the_race_with_a_sentence(visit: Callable[..., Any], site: Site) -> None:
    page = visit().page
    with Ticket(site.service.admission, 10 * site.service.admission.limit_tokens):
        page.get_by_role("button", name="Start race").click()
        expect(page.get_by_role("alert")).to_contain_text("The service is full")
    expect(page.locator("#race-status")).to_have_text("The race ended early.")


def test_a_service_that_ends_is_a_sentence(
    visit: Callable[..., Any], site: Site, monkeypatch: pytest.MonkeyPatch
) -> None:
    page = visit().page
    with monkeypatch.context() as patched:
        patched.setattr(site.service.lifecycle, "closed", True)
        page.get_by_role("button", name="Compare").click()
        expect(page.get_by_role("alert")).to_contain_text("The service is ending")


def test_no_service_at_all_is_a_sentence(visit: Callable[..., Any]) -> None:
    opened = visit()
    opened.context.set_offline(True)
    opened.page.get_by_role("button", name="Compare").click()
    expect(opened.page.get_by_role("alert")).to_contain_text("The service does not answer.")
    expect(opened.page.locator("#live-status")).to_contain_text("does not answer")
    opened.context.set_offline(False)
    opened.page.get_by_role("button", name="Compare").click()
    expect(opened.page.locator("article")).to_have_count(2)


def test_what_the_service_refuses_is_a_sentence(visit: Callable[..., Any]) -> None:
    page = visit().page
    page.get_by_label("Text", exact=True).fill("good " * 400)
    page.get_by_role("button", name="Compare").click()
    expect(page.get_by_role("alert")).to_contain_text("tokens and the model takes 128")
    page.get_by_label("Text", exact=True).fill(" ")
    page.get_by_role("button", name="Compare").click()
    expect(page.get_by_role("alert")).to_have_text("Write a text first, or take an example.")
    expect(page.get_by_label("Text", exact=True)).to_be_focused()


def test_a_key_is_asked_for_and_kept_in_memory_only(
    visit: Callable[..., Any], site: Site, monkeypatch: pytest.MonkeyPatch
) -> None:
    opened = visit()
    page = opened.page
    with monkeypatch.context() as patched:
        patched.setattr(site.service, "keys", Keys([KEY]))
        page.get_by_role("button", name="Compare").click()
        field = page.get_by_label("API key")
        expect(field).to_be_focused()
        field.fill("a wrong key")
        page.keyboard.press("Enter")
        expect(page.get_by_text("The service does not know this key.")).to_be_visible()
        field.fill(KEY)
        page.keyboard.press("Enter")
        expect(page.locator("article")).to_have_count(2)
        expect(field).to_be_hidden()
        page.get_by_label("Requests").select_option("20")
        page.get_by_role("button", name="Start race").click()
        expect(page.locator("#race-status")).to_contain_text("Finished")
    kept = page.evaluate("JSON.stringify([{...localStorage}, {...sessionStorage}, document.cookie])")
    assert kept == '[{},{},""]'
    assert KEY not in page.content()
    assert opened.context.cookies() == []


# ---------------------------------------------------------------------------------------------------- for everybody


def test_with_the_keyboard_alone(visit: Callable[..., Any]) -> None:
    page = visit().page
    order = []
    for _ in range(30):
        page.keyboard.press("Tab")
        focused = page.evaluate(
            "(e => [e.id || e.ariaLabel || e.textContent.trim(), e.tagName])(document.activeElement)"
        )
        if focused[1] == "BODY":
            break
        assert page.evaluate(
            """(at => [at, at.nextElementSibling].some(e => e && getComputedStyle(e).outlineStyle !== 'none'))
               (document.activeElement)"""
        ), f"nothing shows that {focused} has the focus"
        order.append(focused[0])
    examples = ["Praise", "Complaint", "Two negations", "Mixed"]
    assert order[:4] == ["Skip to the text", "API", "Metrics", "Models"]
    assert order[5:] == ["text", *examples, "go", "count", "start", "Table of models"]  # after the task
    page.get_by_label("Classify a text").focus()
    page.keyboard.press("ArrowRight")
    page.keyboard.press("Tab")
    expect(page.get_by_label("Question", exact=True)).to_be_focused()
    page.keyboard.press("ControlOrMeta+a")
    page.keyboard.type("where does clara live")
    page.keyboard.press("Control+Enter")
    expect(page.locator("mark")).to_have_count(2)


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("size", [PHONE, {"width": 1280, "height": 900}], ids=["phone", "desk"])
def test_accessible_and_nowhere_too_wide(visit: Callable[..., Any], scheme: str, size: dict[str, int]) -> None:
    axe = pytest.importorskip("axe_playwright_python.sync_playwright").Axe()
    opened = visit(color_scheme=scheme, viewport=size, reduced_motion="reduce")
    page = opened.page
    assert opened.width() == size["width"]
    page.get_by_label("Requests").select_option("20")
    page.get_by_role("button", name="Start race").click()
    expect(page.locator("#race-status")).to_contain_text("Finished")
    for _ in range(2):
        page.get_by_role("button", name="Compare").click()
        expect(page.locator("article")).to_have_count(2)
        found = axe.run(page)
        assert found.violations_count == 0, found.generate_report()
        assert opened.width() == size["width"]
        table = page.get_by_role("region", name="Table of models")
        assert table.evaluate("box => box.scrollWidth <= box.clientWidth")
        page.get_by_label("Ask a question").check()


def test_weight(visit: Callable[..., Any]) -> None:
    page = visit().page
    sizes = page.evaluate(
        """Object.fromEntries(["navigation", "resource"].flatMap(type => performance.getEntriesByType(type))
             .map(entry => [new URL(entry.name).pathname, entry.decodedBodySize]))"""
    )
    assert {"/", "/page/page.css", "/page/page.js", "/page/view.js", "/page/race.js", "/page/live.js"} <= set(sizes)
    assert min(sizes.values()) > 0
    assert sum(sizes.values()) < MAX_WEIGHT


def test_the_table_reads_quantiles_as_prometheus_does(visit: Callable[..., Any], site: Site) -> None:
    page = visit().page
    url = site.url + "/metrics?name[]=dsformer_request_duration_seconds_bucket"
    before = httpx.get(url).text
    for i in range(12):
        httpx.post(site.url + "/variants/dense/classify", json={"inputs": "the film is good " * (1 + i)})
    after = httpx.get(url).text
    found = page.evaluate(
        """async ([before, after]) => {
             const { Live, parse } = await import("/page/live.js");
             const live = new Live();
             live.add(parse(before), 100);
             live.add(parse(after), 104);
             return live.of("classify", "dense");
           }""",
        [before, after],
    )
    old, new = buckets(before), buckets(after)
    counts = [(edge, new[edge] - old[edge]) for edge in sorted(new)]
    assert found["perSecond"] == pytest.approx(counts[-1][1] / 4)
    for name, share in (("p50", 0.5), ("p95", 0.95)):
        rank, low, below = share * counts[-1][1], 0.0, 0.0
        for edge, count in counts:
            if count >= rank:
                assert found[name] == pytest.approx(low + (edge - low) * (rank - below) / (count - below))
                break
            low, below = edge, count


def buckets(text: str) -> dict[float, float]:
    return {
        float(s.labels["le"]): s.value
        for family in text_string_to_metric_families(text)
        for s in family.samples
        if (s.labels["task"], s.labels["variant"]) == ("classify", "dense")
    }


def test_the_table_begins_anew_when_the_service_does(visit: Callable[..., Any]) -> None:
    found = visit().page.evaluate(
        """async () => {
             const { Live } = await import("/page/live.js");
             const live = new Live();
             const counted = (count) => new Map([["qa dense", [[0.1, count], [Infinity, count]]]]);
             live.add(counted(90), 0);
             live.add(counted(3), 2);
             live.add(counted(7), 4);
             return live.of("qa", "dense");
           }"""
    )
    assert found == {"p50": 0.05, "p95": pytest.approx(0.095), "perSecond": 2}


def test_docs_without_a_network(visit: Callable[..., Any]) -> None:
    page = visit("/docs").page
    expect(page.get_by_text("/compare", exact=True).first).to_be_visible()
    page.get_by_text("/livez", exact=True).first.click()
    page.get_by_role("button", name="Try it out").click()
    page.get_by_role("button", name="Execute").click()
    expect(page.locator(".responses-inner").first).to_contain_text('"status": "ok"')


# ------------------------------------------------------------------------------------------------- without a browser


def test_files_and_their_policy(site: Site) -> None:
    for path in ("/", "/docs", *(f"/page/{name}" for name in OURS)):
        first = httpx.get(site.url + path)
        assert first.status_code == 200
        policy = first.headers["content-security-policy"]
        assert "default-src 'none'" in policy
        assert "unsafe" not in policy
        assert first.headers["x-content-type-options"] == "nosniff"
        again = httpx.get(site.url + path, headers={"if-none-match": first.headers["etag"]})
        assert (again.status_code, again.content) == (304, b"")
    wrong = httpx.get(site.url + "/page/app.py")
    assert (wrong.status_code, wrong.json()["error_type"]) == (404, "not_found")
    assert httpx.post(site.url + "/").status_code == 405


def test_metrics_by_name(site: Site) -> None:
    some = httpx.get(site.url + "/metrics", params={"name[]": ["dsformer_model_ready", "nothing"]}).text
    assert {family.name for family in text_string_to_metric_families(some)} == {"dsformer_model_ready"}
    assert len(some) < len(httpx.get(site.url + "/metrics").text) / 10
