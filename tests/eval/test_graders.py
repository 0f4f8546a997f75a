"""Judges: what is asked of them, what their replies mean, and what happens when none comes."""

from __future__ import annotations

import json
import sys
import threading
import time
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
from PIL.Image import Image

from open_pisces.eval.evaluation import rescore
from open_pisces.eval.run import RunFolder
from open_pisces.eval.understanding import graders
from open_pisces.eval.understanding.benchmarks import benchmarks
from open_pisces.eval.understanding.evaluate import evaluate
from open_pisces.eval.understanding.questions import read_questions
from open_pisces.generate.chat_model import ChatModel, ChatModelError, NoReply

Reply = str | int | tuple[int, str]
IS_IT = [{"role": "user", "content": "Is it?"}]


class Endpoint:
    """A chat completions server on this machine; ``says`` makes a reply, or an HTTP status, of each request."""

    def __init__(self) -> None:
        self.says: Callable[[dict[str, Any], int], Reply] = lambda body, number: "yes"
        self.asked: list[dict[str, Any]] = []
        self.keys: list[str | None] = []
        self.slept: list[float] = []
        self.hold = threading.Event()
        self.headers = {"Content-Type": "application/json"}
        endpoint = self

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                endpoint.asked.append({"path": self.path, **body})
                endpoint.keys.append(self.headers["Authorization"])
                said = endpoint.says(body, len(endpoint.asked))
                if said == "wait":
                    endpoint.hold.wait(5)
                status, text = (
                    said if isinstance(said, tuple) else (said, "busy") if isinstance(said, int) else (200, said)
                )
                answer = {"choices": [{"message": {"content": text}}]}
                content = text.encode() if text.startswith("<") or status != 200 else json.dumps(answer).encode()
                self.send_response(status)
                for name, value in endpoint.headers.items():
                    self.send_header(name, value)
                self.end_headers()
                self.wfile.write(content)

            def log_message(self, *args: Any) -> None:
                """Nothing: the tests look at ``asked``."""

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.server.handle_error = lambda *args: None  # type: ignore[method-assign]  # a client that hung up
        self.url = f"http://127.0.0.1:{self.server.server_port}/v1"
        threading.Thread(target=self.server.serve_forever, args=(0.02,), daemon=True).start()

    def judge(self, **how: Any) -> ChatModel:
        """A judge there."""
        return ChatModel("judge-1", self.url, **{"tries": 4, **how})


@pytest.fixture
def endpoint(monkeypatch: pytest.MonkeyPatch) -> Iterator[Endpoint]:
    found = Endpoint()
    monkeypatch.setattr(time, "sleep", found.slept.append)  # the client's pauses
    yield found
    found.hold.set()
    found.server.shutdown()
    found.server.server_close()


# ------------------------------------------------------------------------------------------------------- requests


def test_a_request_is_an_openai_chat_completion(endpoint: Endpoint, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OPENAI_API_KEY", "secret")
    judge = endpoint.judge()
    messages = [{"role": "system", "content": "You judge."}, *IS_IT]
    assert judge.reply(messages, 0.5, 16) == "yes" and endpoint.keys == ["Bearer secret"]
    (body,) = endpoint.asked
    assert body.pop("path") == "/v1/chat/completions"
    assert body == {"model": "judge-1", "messages": messages, "temperature": 0.5, "max_tokens": 16}
    monkeypatch.delenv("OPENAI_API_KEY")
    judge.reply(IS_IT)
    assert endpoint.keys[1] is None and len(endpoint.asked[1]["messages"]) == 1
    assert "secret" not in repr(judge)


@pytest.mark.parametrize("trouble", [500, 429, 503, "<html>down</html>", " ", (200, "<br>")])
def test_a_passing_trouble_is_tried_again_with_growing_pauses(endpoint: Endpoint, trouble: Reply) -> None:
    endpoint.says = lambda body, number: trouble if number < 4 else "yes"
    assert endpoint.judge().reply(IS_IT) == "yes" and len(endpoint.asked) == 4
    for pause, most in zip(endpoint.slept, (0.5, 1, 2), strict=True):
        assert 0.75 * most <= pause <= most  # up to a quarter is left out by chance


def test_what_does_not_pass_is_no_reply(endpoint: Endpoint) -> None:
    endpoint.says = lambda body, number: 500
    with pytest.raises(NoReply, match=r"judge-1 at http://127.*no reply in 4 tries \(HTTP 500\)"):
        endpoint.judge().reply(IS_IT)
    endpoint.says = lambda body, number: "wait"
    with pytest.raises(NoReply, match=r"no reply in 2 tries .*timed out"):
        endpoint.judge(timeout=0.1, tries=2).reply(IS_IT)
    with pytest.raises(NoReply, match="no reply in 2 tries"):
        ChatModel("judge-1", "http://127.0.0.1:9/v1", tries=2).reply(IS_IT)


@pytest.mark.parametrize(("status", "says"), [(401, "HTTP 401"), (404, "the model's name"), (400, "no such model")])
def test_a_refusal_is_not_tried_again(endpoint: Endpoint, status: int, says: str) -> None:
    endpoint.says = lambda body, number: (status, "no such model")
    with pytest.raises(ChatModelError, match=says):
        endpoint.judge().reply(IS_IT)
    assert len(endpoint.asked) == 1
    with pytest.raises(ChatModelError, match="'judge.example' is no http address"):
        ChatModel("judge-1", "judge.example")


def test_pauses_are_the_servers_where_it_names_them_and_the_types_of_its_answers_do_not_matter(
    endpoint: Endpoint,
) -> None:
    endpoint.headers = {"Retry-After": "7", "Content-Type": "text/plain"}
    endpoint.says = lambda body, number: 429 if number == 1 else "yes"
    assert endpoint.judge().reply(IS_IT) == "yes" and endpoint.slept == [7]


def test_a_missing_client_library_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "openai", None)
    with pytest.raises(ChatModelError, match=r"^judge-1: needs the openai library: pip install 'open-pisces\[eval\]'$"):
        ChatModel("judge-1").reply(IS_IT)


# -------------------------------------------------------------------------------------------------------- replies

REPLIES: dict[Callable[[str], Any], dict[str, Any]] = {
    graders.read_tenths: {  # MM-Vet: the first word as a number in [0, 1]
        **{"0.5": 0.5, "1.0": 1.0, "0": 0.0, "0.8 because": 0.8, " 0.3\n": 0.3},
        **{"1.5": None, "-0.1": None, "good": None, "Grade: 0.5": None, "": None},
    },
    graders.read_marks: {  # LLaVA-W parse_score: two numbers on the first line, comma or blank between them
        **{"8 7": [8, 7], "8, 7": [8, 7], "8.5 7\nThe first is better.": [8.5, 7], "10 1": [10, 1]},
        **{"8": None, "8 7 6": None, "8/10 7/10": None, "-1 -1": None, "11 5": None, "\n8 7 x": None, "": None},
    },
    graders.read_verdict: {  # HallusionBench
        **{"correct": "correct", "Incorrect.": "incorrect", "UNCLEAR": "unclear", '"correct"': "correct"},
        **{"It is incorrect": "incorrect", "correct or incorrect": None, "right": None, "incorrectly": None, "": None},
    },
    graders.read_extraction: {  # MathVista
        **{"14": "14", " B \n": "B", "[1, 2]": "[1, 2]", "1.5\nas said": "1.5", "\n3": "3"},
        **{"": None, "  ": None, "\n": None},
    },
    graders.read_letter: {  # MMBench: one letter of A to E
        **{"B": "B", "(C)": "C", "A.": "A", "The answer is D": "D", "E": "E", "B B": "B"},
        **{"A or B": None, "b": None, "none": None, "": None},
    },
}


@pytest.mark.parametrize(("read", "reply", "value"), [(r, t, v) for r, c in REPLIES.items() for t, v in c.items()])
def test_what_replies_mean(read: Callable[[str], Any], reply: str, value: Any) -> None:
    assert read(reply) == value


def test_every_judged_benchmark_has_a_prompt_that_shows_all_it_needs() -> None:
    judged = {row.name for row in benchmarks().values() if row.judge != "no"}
    assert set(graders.kinds()) == judged and set(graders.READS.values()) == set(REPLIES)
    for name in judged:
        for item in read_questions(benchmarks()[name], "fixtures").items:
            prompt = graders.prompt_of(graders.kinds()[name]["prompt"], item, "{my} answer")
            assert "{my} answer" in prompt and item["prompt"].split("\n")[0] in prompt
            if name in ("mm_vet", "llava_w"):
                assert str(item["gold"]).split("<")[0] in prompt
    (vet,) = [item for item in read_questions(benchmarks()["mm_vet"], "fixtures").items if "<AND>" in item["gold"]]
    assert "| red circle <AND> blue square | both |" in graders.prompt_of(
        graders.kinds()["mm_vet"]["prompt"], vet, "both"
    )


# ----------------------------------------------------------------------------------------------------- whole runs


class Pupil:
    """Says the same to everything, or what the prompt asks for."""

    def __init__(self, says: Callable[[str], str]) -> None:
        self.says = says

    def text(self, images: list[list[Image]], prompts: list[str], max_new_tokens: int) -> list[str]:
        """One answer each."""
        return [self.says(prompt) for prompt in prompts]

    def answer(self, conversations: Any, images: Any, max_new_tokens: int) -> list[str]:
        """Not asked here."""
        raise AssertionError


def result(pupil: Pupil, name: str, model: Path, folder: Path, judge: ChatModel | None) -> dict[str, Any]:
    """One benchmark over the fixtures."""
    found = evaluate(pupil, name, model=model, folder=folder, judge=judge)
    row: dict[str, Any] = found["rows"][name]
    return row


def rescored(folder: Path, **options: Any) -> dict[str, Any]:
    """The scores of a run made again, as `evaluate` gives them."""
    found = rescore(folder, **options)
    assert found.pop("folder") == str(folder)
    return found


def last_line(body: dict[str, Any], start: str) -> str:
    """The last line of the prompt that starts so."""
    lines = [line for line in body["messages"][-1]["content"].split("\n") if line.startswith(start)]
    return lines[-1].removeprefix(start)


def test_mm_vet_is_the_mean_grade_and_names_its_judge(endpoint: Endpoint, nano_folder: Path, tmp_path: Path) -> None:
    grades = {
        "What is drawn": "0.5",
        "Which word": "1.0",
        "How much": "0.0",
        "What stands": "0.7",
        "Which month": "1.0",
    }
    endpoint.says = lambda body, number: next(
        g for q, g in grades.items() if f"\n{q}" in body["messages"][0]["content"]
    )
    without = result(Pupil(lambda prompt: "a circle"), "mm_vet", nano_folder, tmp_path, None)
    assert without["score"] is None and "needs a language model as judge" in without["why"] and not endpoint.asked
    found = result(Pupil(lambda prompt: "never asked"), "mm_vet", nano_folder, tmp_path, endpoint.judge())
    assert found["score"] == 64 and found["n"] == 5 and found["low"] < 64 < found["high"]  # 3.2 / 5
    assert found["judge"]["name"] == "judge-1" and (found["judge"]["judged"], found["judge"]["unjudged"]) == (5, 0)
    assert len(found["judge"]["date"]) == 10 and found["strict"] is None and len(endpoint.asked) == 5
    again = rescored(tmp_path / "mm_vet")  # from the folder alone
    assert again == found and len(endpoint.asked) == 5
    result(Pupil(lambda prompt: ""), "mm_vet", nano_folder, tmp_path, endpoint.judge())
    assert len(endpoint.asked) == 5  # what is judged is not asked again


def test_unjudged_answers_are_left_out_and_asked_again_later(
    endpoint: Endpoint, nano_folder: Path, tmp_path: Path
) -> None:
    def moody(body: dict[str, Any], number: int) -> Reply:
        text = body["messages"][0]["content"]
        return "hm" if "\nHow much" in text else 500 if "\nWhich word" in text else "0.6"

    endpoint.says = moody
    found = result(Pupil(lambda prompt: "x"), "mm_vet", nano_folder, tmp_path, endpoint.judge())
    assert found["score"] == 60 and (found["judge"]["judged"], found["judge"]["unjudged"]) == (3, 2)
    assert found["n"] == 3 and "2 answers are unjudged and left out" in found["why"]
    tries = [body["temperature"] for body in endpoint.asked if "\nHow much" in body["messages"][0]["content"]]
    assert tries == [0.0, 0.5, 1.0, 1.5, 2.0]  # garbage is asked for again, less greedily
    endpoint.says = lambda body, number: "1.0"
    before = len(endpoint.asked)
    whole = rescored(tmp_path / "mm_vet", judge=endpoint.judge())
    assert whole["score"] == pytest.approx(76) and len(endpoint.asked) == before + 2  # (3 x 0.6 + 2) / 5


def test_nothing_that_can_be_read_is_no_score(endpoint: Endpoint, nano_folder: Path, tmp_path: Path) -> None:
    endpoint.says = lambda body, number: "I cannot say"
    found = result(Pupil(lambda prompt: "x"), "llava_w", nano_folder, tmp_path, endpoint.judge())
    assert found["score"] is None and "no answer could be judged" in found["why"] and found["judge"]["unjudged"] == 5


def test_llava_w_is_the_ratio_of_marks(endpoint: Endpoint, nano_folder: Path, tmp_path: Path) -> None:
    endpoint.says = lambda body, number: "8 6\nThe first says more."
    found = result(Pupil(lambda prompt: "a drawing"), "llava_w", nano_folder, tmp_path, endpoint.judge())
    assert found["score"] == found["low"] == found["high"] == 75
    prompt = endpoint.asked[0]["messages"][1]["content"]
    assert "It shows: " in prompt and "[Assistant 2]\na drawing" in prompt


def test_hallusionbench_takes_the_judges_verdict(endpoint: Endpoint, nano_folder: Path, tmp_path: Path) -> None:
    verdicts = {"The circle is on the left.": "correct", "The circle is on the right.": "incorrect"}
    endpoint.says = lambda body, number: verdicts.get(last_line(body, "True answer: "), "unclear")
    found = result(Pupil(lambda prompt: "Yes, left."), "hallusion", nano_folder, tmp_path, endpoint.judge())
    # Right are the two questions on the first picture; by rule "yes" is right in the first, fourth and fifth.
    assert found["score"] == round(100 * 2 / 6, 4) and found["strict"] == 50
    assert found["details"]["fAcc"] == pytest.approx(100 / 3, abs=1e-3)  # pair 0 of pair 0, pair 1, chart 1
    assert found["details"]["qAcc"] == 0


def test_unclear_is_right_where_no_figure_was_shown() -> None:
    from open_pisces.eval.understanding.evaluate import _grade_of

    facts = {"category": "VS", "figure_id": "0"}
    for kind, expected in ((facts, 1), ({**facts, "figure_id": "1"}, 0), ({**facts, "category": "VD"}, 0)):
        assert _grade_of("verdict", {"facts": kind}, "unclear").value == expected
        assert _grade_of("verdict", {"facts": kind}, "correct").value == 1
        assert _grade_of("verdict", {"facts": kind}, "incorrect").value == 0


def test_mathvista_has_answers_extracted_that_the_rules_do_not_read(
    endpoint: Endpoint, nano_folder: Path, tmp_path: Path
) -> None:
    says = {"Which value": "B", "How many corners": "six corners", "average": "3.25", "mean": "hm", "Which two": "4, 6"}
    endpoint.says = lambda body, number: {"six corners": "6", "4, 6": "[4, 6]"}.get(
        last_line(body, "Response: "), "5.0"
    )
    pupil = Pupil(lambda prompt: next(a for q, a in says.items() if q in prompt))
    alone = result(pupil, "mathvista", nano_folder, tmp_path, None)
    assert alone["score"] is None and (alone["strict"], alone["unparsed"]) == (40, 3)
    found = result(pupil, "mathvista", nano_folder, tmp_path, endpoint.judge())
    assert found["score"] == 80 and found["strict"] == 40 and found["judge"]["judged"] == 3  # all but the mean of bars
    assert len(endpoint.asked) == 3


def test_mmbench_asks_about_unread_letters_only_and_settles_whole_questions(
    endpoint: Endpoint, nano_folder: Path, tmp_path: Path
) -> None:
    items = read_questions(benchmarks()["mmbench_en"], "fixtures").items
    gold = {item["prompt"]: item for item in items}

    def pupil(prompt: str) -> str:
        item = gold[prompt]
        if item["unit"] == "241":  # a round red thing, in words that are no option
            return "the round one"
        return str(item["gold"]) if item["unit"] in ("242", "243") else "who knows" if item["unit"] == "245" else "B"

    def judge(body: dict[str, Any], number: int) -> Reply:
        text = body["messages"][0]["content"]
        if last_line(body, "Answer: ") == "the round one":
            return next(line[0] for line in text.split("\n")[::-1] if line.endswith(". circle"))
        return "hm"

    endpoint.says = judge
    alone = result(Pupil(pupil), "mmbench_en", nano_folder, tmp_path, None)
    # Right are 242 and 243; 244 says B to both of its rotations; 241 and 245 cannot be read.
    assert alone["score"] == 40 and "answers that the rules cannot read count as wrong" in alone["why"]
    found = result(Pupil(pupil), "mmbench_en", nano_folder, tmp_path, endpoint.judge())
    assert found["score"] == 75 and found["n"] == 4 and found["strict"] == 40  # 245 is undecided and left out
    assert found["judge"]["unjudged"] == 4 and found["judge"]["judged"] == 4


def test_a_judge_is_not_asked_where_the_rules_read_everything(
    endpoint: Endpoint, nano_folder: Path, tmp_path: Path
) -> None:
    found = evaluate(
        Pupil(lambda prompt: "no"), ["pope", "mm_vet"], model=nano_folder, folder=tmp_path, judge=endpoint.judge()
    )
    assert found["rows"]["pope"]["judge"] is None and found["rows"]["pope"]["score"] is not None
    assert found["rows"]["mm_vet"]["judge"]["unjudged"] == 5 and not (tmp_path / "pope" / "judged.jsonl").exists()


def test_a_judge_that_refuses_stops_the_run_and_keeps_the_answers(
    endpoint: Endpoint, nano_folder: Path, tmp_path: Path
) -> None:
    endpoint.says = lambda body, number: (401, "bad key")
    with pytest.raises(ChatModelError, match="bad key.*the key in OPENAI_API_KEY"):
        result(Pupil(lambda prompt: "x"), "mm_vet", nano_folder, tmp_path, endpoint.judge())
    assert RunFolder.load(tmp_path / "mm_vet").has("answers")
