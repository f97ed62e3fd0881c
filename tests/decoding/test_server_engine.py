"""A model on a server of texts, in place of one that a run has found: a small stand-in server answers."""

import json
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import numpy as np
import pytest
from conftest import compose, save_tiny_model, write_jsonl
from transformers import AutoTokenizer

from w2sg.config.check import check
from w2sg.config.server_schema import ServerConfig
from w2sg.data.dialogue import Chat
from w2sg.data.messages import Dialogue
from w2sg.decoding.completions_limits import Kept
from w2sg.decoding.contrastive import ReplyRows
from w2sg.decoding.server_engine import ServerEngine
from w2sg.errors import ConfigError, UserError
from w2sg.experiment.run import run_method


class Standing:
    """What it is asked, and how it answers."""

    def __init__(self):
        self.bodies, self.url = [], ""

    def answer(self, body: dict) -> tuple[int, dict]:
        self.bodies.append(body)
        choice = {"text": f" it {body['seed'] % 7} ", "finish_reason": "stop"}
        return 200, {"choices": [choice], "usage": {"prompt_tokens": 10, "completion_tokens": 2}}


@pytest.fixture
def server(monkeypatch):
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)
    state, lock = Standing(), threading.Lock()

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self):
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            with lock:
                status, answer = state.answer(body)
            content = json.dumps(answer).encode()
            self.send_response(status)
            self.send_header("Content-Length", str(len(content)))
            self.end_headers()
            self.wfile.write(content)

        def log_message(self, *_):
            pass

    http = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=http.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    state.url = f"http://127.0.0.1:{http.server_port}/v1"
    yield state
    http.shutdown()
    thread.join()
    http.server_close()


@pytest.fixture(scope="module")
def chat(tmp_path_factory) -> Chat:
    return Chat(AutoTokenizer.from_pretrained(save_tiny_model(tmp_path_factory.mktemp("served") / "tiny", "llama")))


def engine(server: Standing, chat: Chat, folder=None, said=None, **options) -> ServerEngine:
    config = ServerConfig(url=server.url, model="m", workers=2, attempts=1, **options)
    kept = (lambda: None) if folder is None else (lambda: Kept(folder))
    return ServerEngine(config, chat, 64, kept, say=(said if said is not None else []).append)


def rows(chat: Chat, count: int = 6, **columns) -> ReplyRows:
    prompts = chat.prompts([Dialogue.of_text(f"\n\nHuman: {k}?\n\nAssistant:") for k in range(count)])
    settings = np.tile([1.0, 0.0, 0.7, columns.get("top_k", 0), 0.9, 1.0], (count, 1))
    places = np.arange(count)
    return ReplyRows(prompts, [str(k) for k in places], places, np.zeros(count, int), settings, 8, 0)


def test_replies_are_texts_in_the_tokens_of_the_model_that_is_stood_in_for(server, chat):
    replies = engine(server, chat).sample(rows(chat), chat.stop)
    assert sorted(body["prompt"][-12:] for body in server.bodies)[0].endswith("Assistant:")
    assert {(b["temperature"], b["top_p"], b["max_tokens"]) for b in server.bodies} == {(0.7, 0.9, 8)}
    asked = {body["prompt"]: body["seed"] for body in server.bodies}
    assert len(set(asked.values())) == 6
    for k, tokens in enumerate(replies.tokens):
        (seed,) = [seed for prompt, seed in asked.items() if f"{k}?" in prompt]
        assert chat.text(tokens).strip() == f"it {seed % 7}"
        assert tokens[-1] == chat.end
        assert np.isnan(replies.log_probabilities[k]).all()
    assert replies.stopped.all()
    with pytest.raises(UserError, match="takes no top_k"):
        engine(server, chat).sample(rows(chat, top_k=5), chat.stop)


def test_a_stage_that_was_killed_asks_nothing_twice(server, chat, tmp_path):
    answer = server.answer
    server.answer = lambda body: answer(body) if len(server.bodies) < 4 else (500, {})
    with pytest.raises(UserError, match="failed 1 times"):
        engine(server, chat, tmp_path).sample(rows(chat), chat.stop)
    first, server.bodies, server.answer = server.bodies, [], answer
    again = engine(server, chat, tmp_path).sample(rows(chat), chat.stop)
    prompts = [body["prompt"] for body in first + server.bodies]
    assert len(first) == 4
    assert len(prompts) == len(set(prompts)) == 6
    server.bodies = []
    third = engine(server, chat, tmp_path).sample(rows(chat), chat.stop)
    assert not server.bodies
    assert [row.tolist() for row in third.tokens] == [row.tolist() for row in again.tokens]


def test_a_budget_ends_the_stage_and_what_was_answered_is_kept(server, chat, tmp_path):
    size = len(chat.tokenizer(server_prompt(chat), add_special_tokens=False)["input_ids"]) + 8
    with pytest.raises(UserError, match=r"^server.max_tokens: the budget of .* is spent"):
        engine(server, chat, tmp_path, max_tokens=size + 30).sample(rows(chat), chat.stop)
    sent = len(server.bodies)
    assert 0 < sent < 6
    engine(server, chat, tmp_path).sample(rows(chat), chat.stop)
    assert len(server.bodies) == 6


def server_prompt(chat: Chat) -> str:
    return chat.tokenizer.decode(rows(chat, 1).prompts[0].tolist())


LABELS = ["A", "B"]


def labelled(engine: ServerEngine, chat: Chat) -> np.ndarray:
    words = [row.tolist() for row in chat.replies(LABELS)]
    return engine.label_log_probabilities(rows(chat, 3).prompts, words)


def test_labels_have_the_servers_log_probabilities(server, chat):
    listed = iter([{" A": -0.5, " B": -1.0, "x": -2.0}, {"A": -0.1, "x": -3.0}, {"x": -0.1}])

    def answer(body: dict) -> tuple[int, dict]:
        if body["logprobs"] > 5:
            return 400, {"error": {"message": "logprobs is 5 at most"}}
        assert body["max_tokens"] == 1
        logprobs = {"top_logprobs": [next(listed)]}
        return 200, {"choices": [{"text": "x", "finish_reason": "length", "logprobs": logprobs}]}

    server.answer, said = answer, []
    found = labelled(
        engine(
            server,
            chat,
            said=said,
        ),
        chat,
    )
    assert found[0].tolist() == [-0.5, -1.0]
    # a label that is not named has at most what the last that is named has
    order = sorted(found[1:].tolist(), key=str)
    assert order[0] == [-0.1, -3.0]
    assert np.isnan(order[1]).all()
    assert any("names none of the labels among its 5 likeliest tokens for 1 questions" in line for line in said)


@pytest.mark.parametrize("logprobs", [None, {}, {"top_logprobs": None}, {"top_logprobs": [None]}])
def test_a_server_without_log_probabilities_is_no_judge(server, chat, logprobs):
    choice = {"text": "x", "finish_reason": "length", "logprobs": logprobs}
    server.answer = lambda body: (200, {"choices": [choice]})
    with pytest.raises(UserError, match=r"gives no log-probabilities .* use a server that does"):
        labelled(engine(server, chat), chat)


# -- in a run ----------------------------------------------------------------------------------------------------------


def refining(folder, models, url: str, *more: str) -> list[str]:
    data = folder / "data"
    data.mkdir(exist_ok=True)
    for name, count in {"ground_truth": 4, "transfer": 4, "test": 3}.items():
        write_jsonl(data / f"{name}.jsonl", [{"question": f"{name} {k}?", "answer": f"it {k}"} for k in range(count)])
    return [
        *("method=refine", "refine=icl", "dataset=questions", f"dataset.path={data}", "weak=hf", "strong=hf"),
        *(f"weak.name={models['weak']}", f"strong.name={models['strong']}", "weak.max_length=96"),
        *(
            "strong.max_length=96",
            "refine.max_new_tokens=4",
            "refine.context_size=2",
            "refine.exemplar='{question} {answer}; '",
        ),
        *("refine.query='{question} so'", "method.sampling.max_new_tokens=4", "method.sft.lr.full=0.002"),
        *("method.sft.epochs=1", "method.sft.global_batch_size=4", "method.baselines=[]", "trainer=cpu", "logger=none"),
        *(f"out={folder}", f"server.url={url}", "server.model=big", *more),
    ]


@pytest.mark.slow
def test_the_strong_model_refines_on_a_server_and_the_weak_one_writes_here(server, models, tmp_path, caplog):
    typed = refining(tmp_path, models, server.url)
    content = run_method(check(compose(*typed)), tmp_path / "one", typed).content
    assert server.bodies
    assert {body["model"] for body in server.bodies} == {"big"}
    assert "a server writes as 'big' in place of strong" in caplog.text
    assert "was trained in this run, so it writes here" in caplog.text
    assert server.url not in json.dumps([stage["key"] for stage in content["stages"]])
    asked, server.bodies = len(server.bodies), []
    again = run_method(check(compose(*typed)), tmp_path / "one", typed).content
    assert all(stage["cached"] for stage in again["stages"])
    assert (asked > 0, server.bodies) == (True, [])


@pytest.mark.parametrize(
    ("more", "said"),
    [
        (["server.model=null"], "server.model: say what the server calls its model"),
        (["server.roles=[]"], "server.roles"),
        (["server.roles=[judge]"], "server.roles: .* no judge that is a language model"),
        (["server.url=http://me:secret@here/v1"], "server.url: reports name it"),
        (["method.sampling.top_k=5"], "server takes no top_k"),
    ],
)
def test_what_no_server_can_do_is_said_before_any_work(models, tmp_path, more, said):
    with pytest.raises(ConfigError, match=said):
        check(compose(*refining(tmp_path, models, "http://127.0.0.1:1/v1", *more)))


def test_a_method_that_writes_nothing_asks_no_server():
    with pytest.raises(ConfigError, match=r"server\.url: nothing is written"):
        check(compose("server.url=http://127.0.0.1:1/v1", "server.model=big"))
