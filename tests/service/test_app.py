"""What holds for every path: the shape of errors, readiness, the page's headers, no torch."""

import subprocess
import sys

import pytest

from service.pages import WEB
from tests.service.conftest import Rows, Serve
from tests.service.fake_engine import FakeEngine


def test_the_service_imports_neither_torch_nor_vllm_nor_the_trainer() -> None:
    names = ("torch", "vllm", "transformers", "trainer")
    script = f"import sys, service.__main__; print([name for name in {names} if name in sys.modules])"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


@pytest.mark.database
def test_paths_and_methods_that_do_not_exist_get_openais_error(serve: Serve) -> None:
    client = serve(FakeEngine())
    for method, path, status in [("GET", "/v1/nope", 404), ("GET", "/v1/chat/completions", 405)]:
        answer = client.request(method, path)
        assert answer.status_code == status
        assert set(answer.json()["error"]) == {"message", "type", "param", "code"}


@pytest.mark.database
def test_it_is_ready_only_while_the_engine_generates(serve: Serve) -> None:
    engine = FakeEngine()
    client = serve(engine)
    assert client.get("/readyz").json() == {"status": "ready", "live": "policy-000000"}
    engine.alive = False
    assert client.get("/readyz").status_code == 503
    assert client.get("/healthz").status_code == 200


@pytest.mark.database
def test_the_models_are_the_alias_and_what_is_loaded(serve: Serve) -> None:
    models = serve(FakeEngine()).get("/v1/models").json()
    assert [model["id"] for model in models["data"]] == ["ratchet", "policy-000000"]


@pytest.mark.database
def test_the_page_takes_nothing_from_other_hosts(serve: Serve) -> None:
    client = serve(FakeEngine())
    for path in ("/", "/label"):
        page = client.get(path)
        assert "default-src 'none'" in page.headers["content-security-policy"]
        assert "unsafe" not in page.headers["content-security-policy"]
    files = [file.name for file in WEB.iterdir() if file.suffix in (".js", ".css", ".html", ".svg")]
    assert len(files) > 20
    for name in files:
        answer = client.get(f"/web/{name}")
        assert answer.status_code == 200
        assert "default-src 'none'" in answer.headers["content-security-policy"]
        assert answer.headers["cache-control"] == "no-cache"
        assert "innerHTML" not in answer.text
        assert "http://" not in answer.text.replace("http://www.w3.org/2000/svg", "")
        assert "https://" not in answer.text


@pytest.mark.database
def test_an_unexpected_fault_says_nothing_of_its_cause(serve: Serve, rows: Rows) -> None:
    client = serve(FakeEngine())
    rows("ALTER TABLE deployment RENAME TO gone")
    answer = client.get("/v1/status")
    assert (answer.status_code, answer.json()["error"]["message"]) == (
        500,
        "Something went wrong. Try again.",
    )


@pytest.mark.database
def test_a_wrong_method_is_told_all_the_right_ones(serve: Serve) -> None:
    client = serve(FakeEngine())
    for path, methods in [
        ("/v1/conversations", {"GET", "POST"}),
        ("/v1/comparisons/cmp-1/vote", {"GET", "PUT", "DELETE"}),
        ("/v1/chat/completions", {"POST"}),
    ]:
        answer = client.request("TRACE", path)
        assert (answer.status_code, set(answer.headers["allow"].split(", "))) == (405, methods)
