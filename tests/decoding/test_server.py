"""Search over a server that only completes text: `transformers serve` on this machine, and a front in its way.

The front is a server as well. What it lets through is written by the real one.
"""

import copy
import hashlib
import json
import logging
import os
import shutil
import socket
import subprocess
import sys
import threading
import time
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import httpx2
import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from conftest import WORDS, compose, run_script, save_tiny_model
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig
from transformers.utils.import_utils import is_serve_available

from w2sg.config.check import check
from w2sg.data.dialogue import Chat, TextChat
from w2sg.data.messages import Dialogue
from w2sg.decoding.completions import HALF, Completions
from w2sg.decoding.decoders.served import Server
from w2sg.decoding.engine import Several
from w2sg.decoding.search import search
from w2sg.decoding.search_values import ImplicitValue
from w2sg.decoding.server import ServerGrower
from w2sg.decoding.transformers_engine import TransformersEngine
from w2sg.errors import ConfigError, UserError
from w2sg.experiment.run import run_method
from w2sg.models.policy import Policy


def needs_server(test):
    """It takes ten seconds to start."""
    there = pytest.mark.skipif(not is_serve_available(), reason="the extra w2sg[server] is not installed")
    return pytest.mark.slow(there(test))


TEXTS = ["\n\nHuman: good?\n\nAssistant:", "\n\nHuman: bad question?\n\nAssistant:"]
PROMPTS = [Dialogue.of_text(text) for text in TEXTS]
KEY = "sk-very-secret-1234"


def free_port() -> int:
    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        return one.getsockname()[1]


@pytest.fixture(autouse=True)
def no_proxy(monkeypatch):
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)


@dataclass
class Served:
    """A running server: its address, a model whose replies go on until they are cut, and one that ends them."""

    url: str
    endless: str
    ending: str


@pytest.fixture(scope="module")
def served(tmp_path_factory) -> Served:
    folder = tmp_path_factory.mktemp("served")
    names = []
    for name, ends in {"endless": [1], "ending": list(range(0, 300, 9))}.items():
        names.append(str(save_tiny_model(folder / name, "llama", seed=3)))
        tokenizer = AutoTokenizer.from_pretrained(folder / name)
        # one model writes plain letters without an end, the other any bytes, many of which are no character
        half = [token for token in range(len(tokenizer)) if HALF in tokenizer.decode([token])]
        suppressed = [1, *half] if name == "endless" else None
        options = GenerationConfig(
            do_sample=True, top_k=0, eos_token_id=ends, pad_token_id=1, suppress_tokens=suppressed
        )
        options.save_pretrained(folder / name)
    port = free_port()
    # what the command `transformers serve` starts, without the imports of its other commands
    start = f"from transformers.cli.serve import Serve; Serve(host='127.0.0.1', port={port}, device='cpu')"
    with open(folder / "log", "w", encoding="utf-8") as log:
        process = subprocess.Popen(
            [sys.executable, "-c", start],
            env={**os.environ, "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"},
            stdout=log,
            stderr=subprocess.STDOUT,
        )
    try:
        with httpx2.Client(trust_env=False) as client:
            while True:
                try:
                    client.get(f"http://127.0.0.1:{port}/health")
                    break
                except httpx2.TransportError:
                    assert process.poll() is None, (folder / "log").read_text()
                    time.sleep(0.2)
        yield Served(f"http://127.0.0.1:{port}/v1", *names)
    finally:
        process.terminate()
        process.wait(20)


@dataclass
class Front:
    """A server before another: says first what it was told to say, then hands requests on.

    Attributes:
        behind: address of the other. several: how it takes ``n``: "ignore", "refuse" or "give".
        first: status, headers and body, or None for an answer that never comes; one a request.
        bodies, answers: of the requests that were handed on. keys: of all.
    """

    client: httpx2.Client
    behind: str = ""
    several: str = "ignore"
    first: list = field(default_factory=list)
    bodies: list = field(default_factory=list)
    answers: list = field(default_factory=list)
    keys: list = field(default_factory=list)
    url: str = ""

    def answer(self, body: dict) -> tuple[int, dict, bytes]:
        n = body.get("n", 1)
        if n > 1 and self.several == "refuse":
            return 400, {}, b'{"error": {"message": "Only one completion choice is allowed"}}'
        times = n if self.several == "give" else 1
        found = []
        for k in range(times):
            one = {**body, "seed": body["seed"] + k}
            one.pop("n", None)
            found.append(self.client.post(f"{self.behind}/completions", json=one).raise_for_status().json())
        whole = found[0]
        whole["choices"] = [{**one["choices"][0], "index": k} for k, one in enumerate(found)]
        whole["usage"]["completion_tokens"] = sum(one["usage"]["completion_tokens"] for one in found)
        self.bodies.append(body)
        self.answers.append(whole)
        return 200, {}, json.dumps(whole).encode()


@pytest.fixture
def front():
    state, lock = Front(httpx2.Client(trust_env=False, timeout=60)), threading.Lock()

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self):
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            assert self.path == "/v1/completions"
            with lock:  # one at a time, since the seed of the server behind is one for all requests
                state.keys.append(self.headers.get("Authorization"))
                told = state.first.pop(0) if state.first else state.answer(body)
            if told is None:
                self.close_connection = True
                return
            status, headers, content = told
            self.send_response(status)
            for name, value in headers.items():
                self.send_header(name, value)
            self.send_header("Content-Length", str(len(content)))
            self.end_headers()
            self.wfile.write(content)

        def log_message(self, *_):
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    state.url = f"http://127.0.0.1:{server.server_port}/v1"
    yield state
    server.shutdown()
    thread.join()
    server.server_close()
    state.client.close()


CLIENT = {"key_variable", "workers", "attempts", "wait", "timeout", "size", "limits", "kept"}


def grower(url: str, model: str = "any", **options) -> ServerGrower:
    options = {"chunk": 4, "most": 12, "seed": 0, **options}
    ours = {"wait": 0.0, "attempts": 3} | {name: options.pop(name) for name in CLIENT & set(options)}
    client = Completions(url, model, **ours)
    return ServerGrower(client, lambda prompts: [f"Read.{p.text}" for p in prompts], TEXTS, **options)


@pytest.fixture(scope="module")
def guide(tmp_path_factory):
    """Two small models, tuned and untuned, and how they write dialogues."""
    folder = save_tiny_model(tmp_path_factory.mktemp("guide") / "tiny")
    tuned = AutoModelForCausalLM.from_pretrained(folder).eval()
    untuned = copy.deepcopy(tuned)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in tuned.parameters():
            parameter += 0.1 * torch.randn(parameter.shape, generator=generator)
    return [Policy(tuned), Policy(untuned)], Chat(AutoTokenizer.from_pretrained(folder))


def implicit(guide, **options) -> ImplicitValue:
    policies, chat = guide
    return ImplicitValue(Several(*map(TransformersEngine, policies)), chat, shared=False, stop=(), **options)


@torch.inference_mode()
def score(guide, prompt: Dialogue, text: str, finished: bool) -> float:
    """log(tuned / untuned) of a whole reply, read at once by models without a cache."""
    policies, chat = guide
    reply = chat.replies([text])[0] if text.strip() else np.zeros(0, np.int64)
    reply = np.append(reply, chat.end) if finished else reply
    asked = chat.prompts([prompt])[0]
    ids = torch.from_numpy(np.concatenate([asked, reply]))[None]
    found = []
    for policy in policies:
        logs = policy.model(ids, use_cache=False).logits.double().log_softmax(-1)[0, :-1]
        found.append(float(logs.gather(1, ids[0, 1:, None])[len(asked) - 1 :].sum()))
    return found[0] - found[1]


# -- search ------------------------------------------------------------------------------------------------------------


@needs_server
def test_search_over_the_real_server_alone(served, guide):
    with grower(served.url, served.ending, workers=4) as strong:
        results = search(strong, implicit(guide), PROMPTS, beams=2, children=2)
    for prompt, result in zip(PROMPTS, results, strict=True):
        best = result.best
        assert best.tokens is None
        assert best.ended
        assert best.value == pytest.approx(score(guide, prompt, best.text, best.finished), abs=1e-3)
        assert best.value >= max(h.value for h in result.beam)
        assert result.rounds <= 3


@needs_server
@pytest.mark.parametrize("several", ["ignore", "refuse", "give"])
def test_every_chunk_is_asked_for_where_the_last_one_ended(served, front, guide, several):
    front.behind, front.several = served.url, several
    with grower(front.url, served.ending, chunk=3, most=8) as strong:
        results = search(strong, implicit(guide), PROMPTS, beams=2, children=3, trace=True)
    texts = {f"Read.{p}" for p in TEXTS}
    for body, answer in zip(front.bodies, front.answers, strict=True):
        # what is asked for begins with a prompt and goes on with answers, to the last space
        assert body["prompt"] in texts
        texts |= {(body["prompt"] + choice["text"]).rstrip(HALF) for choice in answer["choices"]}
    written = [len(body["prompt"]) > len("Read.") + max(map(len, TEXTS)) for body in front.bodies]
    assert any(written)
    asked = [body.get("n", 1) for body in front.bodies]
    if several == "give":
        assert asked[:2] == [6, 6]
        assert set(asked[2:]) == {3}
    else:
        assert asked[1:] == [1] * (len(asked) - 1)
        assert asked[0] == (6 if several == "ignore" else 1)
    for prompt, result in zip(PROMPTS, results, strict=True):
        assert len(result.trace[0]) <= 6
        assert result.best.value == pytest.approx(
            score(guide, prompt, result.best.text, result.best.finished), abs=1e-3
        )
    usage = [answer["usage"] for answer in front.answers]
    assert strong.usage.prompt_tokens == sum(u["prompt_tokens"] for u in usage)
    assert strong.usage.completion_tokens == sum(u["completion_tokens"] for u in usage)
    assert strong.usage.requests == len(front.bodies) + (several == "refuse")


@needs_server
def test_best_of_n_is_one_round_of_whole_replies(served, front, guide):
    front.behind, front.several = served.url, "give"
    with grower(front.url, served.ending, chunk=10, most=10) as strong:
        (result,) = search(strong, implicit(guide), PROMPTS[:1], beams=1, children=6, trace=True)
    assert (result.rounds, len(front.bodies), front.bodies[0]["max_tokens"]) == (1, 1, 10)
    replies = {
        (choice["text"].strip() if choice["finish_reason"] == "stop" else choice["text"].rstrip(HALF).strip())
        for choice in front.answers[0]["choices"]
    }
    assert result.best.text in replies
    assert result.best.value == max(noted["value"] for noted in result.trace[0])
    assert len(result.trace[0]) == len(replies) > 1


@needs_server
def test_replies_end_by_themselves_or_are_cut(served):
    results = {}
    for model in (served.ending, served.endless):
        with grower(served.url, model, chunk=8, most=20, workers=1) as strong:
            results[model] = [r for _ in range(3) for r in search(strong, None, PROMPTS, 1, 1)]
    assert all(r.best.cut and not r.best.finished and r.rounds == 3 for r in results[served.endless])
    ended = [r for r in results[served.ending] if r.best.finished]
    assert ended
    for result in ended:
        assert not result.best.cut
        assert result.best.text == result.best.text.strip()


@needs_server
def test_the_same_is_asked_for_again_whatever_else_is_asked(served, front):
    front.behind = served.url
    found = []
    for prompts in (PROMPTS, PROMPTS, PROMPTS[:1]):
        front.bodies = []
        with grower(front.url, served.endless, workers=1) as strong:
            results = search(strong, None, prompts, 1, 1)
        found.append(([r.best.text for r in results], [b for b in front.bodies if b["prompt"].count(TEXTS[0])]))
    assert found[0] == found[1]
    assert (found[2][0], found[2][1]) == (found[0][0][:1], found[0][1])
    bodies = found[2][1]
    assert [b["max_tokens"] for b in bodies] == [4, 4, 4]
    assert len({b["seed"] for b in bodies}) == 3
    with grower(front.url, served.endless, workers=1, seed=1) as other:
        assert search(other, None, PROMPTS[:1], 1, 1)[0].best.text != found[2][0][0]


@needs_server
def test_the_last_chunk_is_as_long_as_there_is_room(served, front):
    front.behind = served.url
    with grower(front.url, served.endless, chunk=4, most=10) as strong:
        (result,) = search(strong, None, PROMPTS[:1], 1, 1)
    assert [body["max_tokens"] for body in front.bodies] == [4, 4, 2]
    assert result.best.cut
    assert sum(a["usage"]["completion_tokens"] for a in front.answers) == 10


@needs_server
def test_a_stop_that_spans_two_chunks_ends_a_reply(served, front):
    front.behind = served.url
    with grower(front.url, served.endless, workers=1) as strong:
        search(strong, None, PROMPTS[:1], 1, 1)
    first, second, _ = (answer["choices"][0]["text"] for answer in front.answers)
    stop = first[-1] + second[0]
    assert stop not in first
    assert stop not in second
    front.bodies = []
    with grower(front.url, served.endless, workers=1, stop=[stop]) as strong:
        (result,) = search(strong, None, PROMPTS[:1], 1, 1)
    assert (result.rounds, result.best.finished) == (2, True)
    assert result.best.text == first[:-1].strip()
    assert all(body["stop"] == [stop] for body in front.bodies)


# -- what goes wrong ---------------------------------------------------------------------------------------------------


def refused(strong: ServerGrower) -> str:
    """What the user is told."""
    with strong, pytest.raises(UserError) as error:
        search(strong, None, PROMPTS, 1, 1)
    text = str(error.value)
    assert KEY not in text
    return text


def test_no_server_is_said_at_once():
    url = f"http://127.0.0.1:{free_port()}/v1"
    strong = grower(url, attempts=50, wait=10.0)
    told = refused(strong)
    assert f"there is no server at {url}" in told
    assert "start it" in told


@pytest.mark.parametrize("url", ["127.0.0.1:8000/v1", "http://127.0.0.1:port/v1"])
def test_an_address_is_one_of_http(url):
    with pytest.raises(UserError, match="not the address of a server"):
        grower(url)


@needs_server
def test_a_model_that_the_real_server_cannot_load(served, tmp_path):
    told = refused(grower(served.url, str(tmp_path / "none"), attempts=2))
    assert "failed 2 times" in told
    assert str(tmp_path / "none") in told


ODD = [b"<html>hello</html>", b"[]", b"{}", b'{"choices": []}', b'{"choices": [{"text": 1, "finish_reason": "stop"}]}']
ODD += [b'{"choices": [{"text": "a"}]}', b'{"choices": [{"text": "a", "finish_reason": {}}]}']
ODD += [b'{"choices": [{"text": "a", "finish_reason": "stop"}], "usage": {"prompt_tokens": "many"}}']
REFUSALS = [
    (404, b'{"error": {"message": "The model `any` does not exist.", "code": 404}}', ["'any'", "/models", "exist"]),
    (404, b'{"detail": "Not Found"}', ["/v1", "Not Found"]),
    (400, b"{\"detail\": \"Server is pinned to 'x'; requested 'any'.\"}", ["'any'", "pinned to 'x'"]),
    (400, b'{"message": "maximum context length is 8"}', ["context length is 8", "shorten"]),
    (200, b'{"error": {"message": "unknown model"}}', ["'any'", "unknown model"]),
    (302, b"elsewhere", ["302", "address"]),
    *[(200, body, ["format of OpenAI's completions"]) for body in ODD],
]


OK = b'{"choices": [{"text": "a b c d e f g h i j k l m n", "finish_reason": "length"}]'
MISBEHAVING = [  # whatever is wrong is named in one line, with the server
    (200, OK + b', "usage": {"prompt_tokens": 3, "completion_tokens": 14}}', ["ignores max_tokens", "wrote 14"]),
    (200, OK.replace(b"n", b"n " * 20, 1) + b"}", ["ignores max_tokens"]),
    (200, b'{"choices": [{"text": "Read.\\n\\nHuman: good?\\n\\nAssistant: x", "finish_reason": "stop"}]}', ["(echo)"]),
    (200, b'{"choices": [{"text": "a", "finish_reason": "eos_token"}]}', ["for the reason 'eos_token'"]),
    (200, b'{"choices": [{"text": "a", "finish_reason": null}]}', ["for the reason None"]),
    (200, b'{"choices": [{"message": {"content": "a"}, "finish_reason": "stop"}]}', ["as chats are answered"]),
    (200, b'data: {"choices": [{"text": "a"}]}\n\ndata: [DONE]', ["streams pieces"]),
    (200, b"", ["an empty body"]),
    (
        503,
        b"<!DOCTYPE html><html><style>p {}</style><p>Over capacity</p></html>",
        ["a page of HTML", "Over cap"],
    ),
    (404, b"<html><h1>404</h1>nginx</html>", ["a page of HTML", "nginx"]),
]


@pytest.mark.parametrize(("status", "body", "wanted"), MISBEHAVING)
def test_what_a_server_does_otherwise_is_named(front, status, body, wanted):
    front.first = [(status, {}, body)] * 10
    told = refused(grower(front.url, size=lambda text: len(text.split()), workers=1))
    assert all(part in told for part in [front.url, *wanted])
    assert not any(part in told for part in ("<p>", "p {}", "\n"))


def test_another_models_name_and_single_texts_are_said_once(front, caplog):
    caplog.set_level(logging.INFO)
    front.answer = lambda body: (
        200,
        {},
        json.dumps({"model": "other", "choices": [{"text": " a", "finish_reason": "length"}]}).encode(),
    )
    with grower(front.url, workers=1) as strong:
        search(strong, None, PROMPTS, 2, 1, distinct=False)
    assert caplog.text.count("answers as the model 'other'; 'any' was asked for") == 1
    assert caplog.text.count("gives one text a request") == 1


@pytest.mark.parametrize(("status", "body", "wanted"), REFUSALS)
def test_answers_that_are_none(front, status, body, wanted):
    front.first = [(status, {}, body)] * 10
    told = refused(grower(front.url))
    assert all(part in told for part in [front.url, *wanted])
    assert len(front.keys) <= len(PROMPTS)  # asking again would not help


def test_a_key_goes_to_the_server_and_nowhere_else(front, monkeypatch, caplog):
    monkeypatch.setenv("MY_KEY", f"{KEY}\n")
    caplog.set_level(logging.DEBUG)
    monkeypatch.setattr(logging.getLogger("httpx2"), "level", logging.DEBUG)
    front.first = [(401, {}, json.dumps({"error": {"message": f"Incorrect key: {KEY}."}}).encode())] * 10
    told = refused(grower(front.url, key_variable="MY_KEY"))
    assert "MY_KEY was refused" in told
    assert "Incorrect key: ***" in told
    assert set(front.keys) == {f"Bearer {KEY}"}
    assert caplog.records
    assert KEY not in caplog.text
    front.first = [(401, {}, b"no key")] * 10
    assert "OPENAI_API_KEY is not set" in refused(grower(front.url))
    assert front.keys[-1] is None
    monkeypatch.setenv("MY_KEY", f"{KEY}\nä")
    with pytest.raises(UserError, match="MY_KEY has characters") as error:
        grower(front.url, key_variable="MY_KEY")
    assert KEY not in str(error.value)


@needs_server
def test_a_busy_server_is_asked_again(served, front, monkeypatch):
    front.behind = served.url
    waits = []
    monkeypatch.setattr("w2sg.decoding.completions.time.sleep", waits.append)
    with grower(front.url, served.endless, wait=0.5, attempts=5) as strong:
        front.first = [(429, {"Retry-After": "7"}, b"slowly"), (503, {}, b""), None, (408, {}, b"")]
        (result,) = search(strong, None, PROMPTS[:1], 1, 1)
        assert result.best.cut
        assert waits == [7.0, 1.0, 2.0, 4.0]
        assert strong.usage.requests == 4 + 3
    front.first = [(429, {}, b'{"error": {"message": "too many requests"}}')] * 10
    told = refused(grower(front.url, served.endless))
    assert "failed 3 times" in told
    assert "429: too many requests" in told
    assert "workers" in told


@needs_server
def test_an_answer_that_does_not_come_is_asked_for_again(served, front, monkeypatch):
    front.behind = served.url
    late = threading.Event()
    answer = front.answer

    def slow(body):
        if not late.is_set():
            late.set()
            time.sleep(0.6)
            return 200, {}, b"too late"
        return answer(body)

    front.answer = slow
    body = {"model": served.endless, "prompt": "a", "max_tokens": 1, "seed": 0}
    answer(body)  # the model is read on the first request
    with grower(front.url, served.endless, timeout=0.5, attempts=20) as strong:
        (result,) = search(strong, None, PROMPTS[:1], 1, 1)
    assert result.best.cut
    assert strong.usage.requests > 3  # chunks


# -- from the configuration --------------------------------------------------------------------------------------------

SAYS = ("search", "best_of_n")
SMALL = {"search": ["decoder.beams=2", "decoder.children=2", "decoder.chunk=2"], "best_of_n": ["decoder.samples=3"]}


@pytest.fixture(scope="module")
def models(tmp_path_factory) -> dict[str, str]:
    """The guide after and before its alignment, and a strong model without weights: no more than a tokenizer."""
    folder = tmp_path_factory.mktemp("models")
    for name, seed in (("weak", 0), ("untuned", 7), ("strong", 1)):
        save_tiny_model(folder / name, "llama" if name == "strong" else "gpt2", width=16, seed=seed)
    (folder / "strong" / "model.safetensors").unlink()
    return {name: str(folder / name) for name in ("weak", "untuned", "strong")}


@pytest.fixture
def arguments(pairs_folder, models):
    def make(out, kind: str, *more: str) -> list[str]:
        return [
            f"decoder={kind}",
            "decoder.max_new_tokens=6",
            *SMALL.get(kind, ()),
            "dataset=local",
            f"dataset.path={pairs_folder}",
            "dataset.sizes={weak_train: 8, transfer: 8, test: 4}",
            *(f"{role}=hf" for role in ("weak", "strong")),
            *(f"{role}.name={models[role]}" for role in ("weak", "strong")),
            f"weak.before_alignment={models['untuned']}",
            *(f"{role}.{key}" for role in ("weak", "strong") for key in ("train=full", "max_length=96")),
            "method.judge.model=null",
            "method.evaluation.surprise=false",
            "trainer=cpu",
            "logger=none",
            f"out={out}",
            *more,
        ]

    return make


def at(front: Front, model: str = "any") -> list[str]:
    return [f"decoder.server.url={front.url}", f"decoder.server.model={model}"]


def run(typed: list[str], out) -> dict:
    return run_method(check(compose(*typed, name="decode")), out / "run", typed).content


def samples(out, system: str) -> dict[str, dict]:
    rows = pq.read_table(out / "run" / "samples.parquet").to_pylist()
    return {row["prompt_id"]: row for row in rows if row["system"] == system}


def scripted(front: Front, counts: bool = True) -> None:
    """Instead of a model behind: a word a token, whichever the text so far and the seed say; some end a reply."""

    def answer(body: dict) -> tuple[int, dict, bytes]:
        choices = []
        for k in range(body.get("n", 1)):
            text, reason = "", "length"
            for _ in range(body["max_tokens"]):
                said = f"{body['seed']}:{k}:{body['prompt']}{text}"
                drawn = hashlib.sha256(said.encode()).digest()[0]
                if drawn < 30:
                    reason = "stop"
                    break
                text += f" {WORDS[drawn % len(WORDS)]}"
            choices.append({"text": text, "finish_reason": reason, "index": k})
        whole = {"choices": choices}
        if counts:
            written = sum(len(choice["text"].split()) for choice in choices)
            whole["usage"] = {"prompt_tokens": len(body["prompt"].split()), "completion_tokens": written}
        front.bodies.append(body)
        front.answers.append(whole)
        return 200, {}, json.dumps(whole).encode()

    front.answer = answer


def spelled_out(front: Front, prompts: set[str]) -> dict[str, set[str]]:
    """All that was ever said to each prompt, by the requests and their answers alone."""
    said = {prompt: set() for prompt in prompts}
    for body, answer in zip(front.bodies, front.answers, strict=True):
        (prompt,) = [p for p in prompts if body["prompt"].startswith(p)]
        assert body["prompt"] == prompt or body["prompt"][len(prompt) :] in said[prompt]
        said[prompt] |= {body["prompt"][len(prompt) :] + choice["text"] for choice in answer["choices"]}
    return {prompt: {text.strip() for text in texts} for prompt, texts in said.items()}


@pytest.mark.parametrize("kind", SAYS)
@pytest.mark.parametrize("counts", [True, False])
def test_a_server_writes_in_place_of_the_strong_model(front, models, arguments, tmp_path, kind, counts):
    scripted(front, counts)
    typed = arguments(tmp_path, kind, *at(front), "method.style=roles")
    content = run(typed, tmp_path)
    tokenizer = AutoTokenizer.from_pretrained(models["strong"])
    chat, said = TextChat(tokenizer, "roles"), {}
    assert all(body["model"] == "any" and body["stop"] == list(chat.stop_strings) for body in front.bodies)
    rows = {name: samples(tmp_path, name) for name in ("plain", kind)}
    texts = {
        row["prompt"]: tokenizer.decode(chat.prompts([Dialogue.of_text(row["prompt"])])[0])
        for row in rows[kind].values()
    }
    assert len(set(texts.values())) == 4
    assert all(text.endswith("[Assistant]\n") for text in texts.values())
    said = spelled_out(front, set(texts.values()))
    asked = {"plain": [], kind: []}
    for body, answer in zip(front.bodies, front.answers, strict=True):
        plain = (
            body.get("n", 1) == 1 and len(asked["plain"]) < 4
        )  # plain samples are written first, by one request each
        asked["plain" if plain else kind].append((body, answer))
    for name, own in rows.items():
        assert set(own) == set(rows["plain"])
        for row in own.values():
            assert row["reply"] in said[texts[row["prompt"]]]
            assert row["tokens"] == len(chat.replies([row["reply"]])[0]) + row["finished"]
            assert row["counted_by"] == ("server" if counts else "tokenizer")
        size = (lambda text: len(text.split())) if counts else (lambda text: len(tokenizer(text)["input_ids"]))
        read = sum(
            size(body["prompt"]) + sum(size(choice["text"]) for choice in answer["choices"])
            for body, answer in asked[name]
        )
        assert sum(row["strong_read"] for row in own.values()) == pytest.approx(read)
        written = sum(row["tokens"] for row in own.values())
        assert content["decoding"]["systems"][name]["cost"]["strong"] == pytest.approx(read / written)
    tuned, untuned = (AutoModelForCausalLM.from_pretrained(models[name]).eval() for name in ("weak", "untuned"))
    judge = [Policy(tuned), Policy(untuned)], Chat(AutoTokenizer.from_pretrained(models["weak"]))
    for row in rows[kind].values():
        assert row["value"] == pytest.approx(
            score(judge, Dialogue.of_text(row["prompt"]), row["reply"], row["finished"]), abs=1e-3
        )
    for trace in content["decoding"]["traces"]:
        assert trace["best"] in {row["reply"] for row in rows[kind].values()}
        assert trace["rounds"]
    assert len(content["decoding"]["traces"]) == (4 if kind == "search" else 0)
    # the same at another address that nobody answers at: all is there, whatever was said of how to ask
    shutil.copytree(tmp_path / "run", tmp_path / "before")
    typed[typed.index(f"decoder.server.url={front.url}")] = f"decoder.server.url=http://127.0.0.1:{free_port()}/v1"
    again = run([*typed, "decoder.server.workers=1", "decoder.batch_size=3"], tmp_path)
    assert all(stage["cached"] for stage in again["stages"])
    assert again["decoding"]["traces"] == content["decoding"]["traces"]
    # another model behind the name would say something else
    with pytest.raises(UserError, match="there is no server at"):
        run([*typed, "decoder.server.model=other"], tmp_path)


def test_what_was_answered_is_kept_where_the_server_fails(front, arguments, tmp_path, monkeypatch):
    monkeypatch.setattr("w2sg.decoding.completions.time.sleep", lambda seconds: None)
    scripted(front)
    typed = arguments(tmp_path, "search", *at(front), "decoder.batch_size=1", "decoder.server.attempts=2")
    whole = run(typed, tmp_path / "whole")
    replies = samples(tmp_path / "whole", "search")
    asked = [json.dumps(body, sort_keys=True) for body in front.bodies]
    assert len(set(asked)) == len(asked)
    shutil.rmtree(tmp_path / "store")
    front.bodies, front.answers = [], []
    answer = front.answer

    def failing(body):
        return answer(body) if len(front.bodies) < 2 * len(asked) // 3 else (500, {}, b"out of order")

    front.answer = failing
    with pytest.raises(UserError, match=r"failed 2 times .* out of order"):
        run(typed, tmp_path)
    first = [json.dumps(body, sort_keys=True) for body in front.bodies]
    front.bodies, front.answer = [], answer
    again = run(typed, tmp_path)
    second = [json.dumps(body, sort_keys=True) for body in front.bodies]
    assert set(first) | set(second) == set(asked)
    assert not set(first) & set(second)  # nothing is asked twice
    kept = [json.loads(body)["max_tokens"] for body in set(first) - set(second)]
    assert (kept.count(6), kept.count(2) > 1) == (4, True)  # all plain samples, and whole searches
    assert {i: row["reply"] for i, row in samples(tmp_path, "search").items()} == {
        i: row["reply"] for i, row in replies.items()
    }
    assert again["decoding"]["traces"] == whole["decoding"]["traces"]


def test_a_server_that_is_not_there_fails_before_anything_is_trained(arguments, tmp_path):
    url = f"http://127.0.0.1:{free_port()}/v1"
    server = [f"decoder.server.url={url}", "decoder.server.model=any"]
    with pytest.raises(UserError, match=f"there is no server at {url}"):
        run(arguments(tmp_path, "search", *server, "weak.before_alignment=null"), tmp_path)
    assert [folder.name.partition("-")[0] for folder in (tmp_path / "store").glob("[a-z]*")] == ["plain"]


@pytest.mark.parametrize(
    ("kind", "typed", "said"),
    [
        ("search", ["decoder.tilt=1.0"], "decoder.tilt: it moves the strong model's logits"),
        ("search", ["method.evaluation.surprise=true"], "method.evaluation.surprise: .* set it to false"),
        ("best_of_n", ["decoder.top_k=50"], "decoder.top_k: .* use top_p"),
        ("best_of_n", ["decoder.server.model=null"], "decoder.server.model: say what the server calls its model"),
        ("search", ["decoder.server.url=localhost:8000/v1"], "decoder.server.url: .* is not the address"),
        ("search", ["decoder.server.url=http://me:secret@here/v1"], "decoder.server.url: reports name it"),
        ("search", ["decoder.server.url=null"], "decoder.server.model: read only where server.url"),
        (
            "search",
            ["decoder.server.url=null", "decoder.server.model=null", "decoder.server.workers=2"],
            "workers: read",
        ),
        ("eft", [], "decoder.server: the logits of all tokens are needed"),
        ("wsd", [], "decoder.server: the strong model's probabilities"),
        ("contrastive", [], "decoder.server: the strong model writes nothing"),
        ("sampling", [], "decoder.server: plain samples are asked"),
    ],
)
def test_what_no_server_can_do_is_refused_before_any_work(arguments, tmp_path, kind, typed, said):
    server = ["decoder.server.url=http://localhost:8000/v1", "decoder.server.model=any"]
    server = [f"+{option}" for option in server] if kind not in SAYS else server
    with pytest.raises(ConfigError, match=said):
        check(compose(*arguments(tmp_path, kind, *server, *typed), name="decode"))


@pytest.mark.parametrize("kind", SAYS)
def test_without_a_server_its_options_are_as_they_stand_in_the_file(kind):
    options = dict(compose(f"decoder={kind}", name="decode").decoder.server)
    assert Server.model_validate(options).url is None
    for name, value in {"key_variable": "KEY", "workers": 9, "attempts": 7, "timeout": 601.0}.items():
        with pytest.raises(ValueError, match=f"{name}: read only where"):
            Server.model_validate({**options, name: value})


def test_a_reply_begins_a_line_and_has_room(front):
    """Where a prompt ends a line, the beginning of a turn is at once the end of the reply."""
    said = iter(["[User]\nand", "so\n[User]\n", "x", "y"])

    def answer(body):
        front.bodies.append(body)
        content = {"choices": [{"text": next(said), "finish_reason": "length"}]}
        return 200, {}, json.dumps(content).encode()

    front.answer = answer
    with grower(front.url, stop=["\n[User]"], workers=1, most=6, room=[5, 2]) as strong:
        strong.identities = ["a"]
        for wanted in ("", "so"):
            (result,) = search(strong, None, PROMPTS[:1], 1, 1)
            assert (result.best.text, result.best.finished, result.rounds) == (wanted, True, 1)
        (result,) = search(strong, None, PROMPTS[:1], 1, 1)
    assert (result.best.text, result.best.cut, result.rounds) == ("xy", True, 2)
    assert [body["max_tokens"] for body in front.bodies] == [4, 4, 4, 1]
    assert strong.usage.uncounted == 4


@needs_server
def test_from_the_command_line_over_the_real_server(served, front, arguments, tmp_path):
    front.behind = served.url
    result = run_script("evaluate.py", *arguments(tmp_path, "search", *at(front, served.ending)), NO_PROXY="127.0.0.1")
    assert "report:" in result.stdout
    (folder,) = [file.parent for file in tmp_path.glob("*/report.json")]
    rows = pq.read_table(folder / "samples.parquet").to_pylist()
    assert len([row for row in rows if row["system"] == "search"]) == 4
    said = set()
    for body, answer in zip(front.bodies, front.answers, strict=True):
        assert len(body["prompt"]) > 20
        for choice in answer["choices"]:
            whole = f"{body['prompt']}{choice['text']}"
            said.add(whole if choice["finish_reason"] == "stop" else whole.rstrip(HALF))
    for row in rows:
        if row["system"] != "guide":
            before = row["prompt"].rstrip(" ")
            assert row["reply"] in {text[len(before) :].strip() for text in said if text.startswith(before)}
    usage = [answer["usage"] for answer in front.answers]
    total = sum(u["prompt_tokens"] + u["completion_tokens"] for u in usage)
    assert sum(row["strong_read"] for row in rows if row["system"] != "guide") == pytest.approx(total)
