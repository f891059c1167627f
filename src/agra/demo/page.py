"""The page of agra demo: a thin layer of Gradio over `agra.demo.session.Session`, one session for each browser tab."""

import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from html import escape
from typing import Any

try:
    import gradio as gr
except ModuleNotFoundError as error:
    raise ImportError("agra demo needs Gradio: pip install '.[demo]' in a checkout of agra") from error

from agra.demo import pictures
from agra.demo.player import OpenPolicy, Player
from agra.demo.session import Session, Tool, all_trials
from agra.diagnostics.report.figures import photo_uri
from agra.simulators.tabletop.tabletop_env import Tabletop

FIRST_TRIAL = "semantic/pick-bread-or-can/can-designed"
"""Both bundled policies succeed in this trial of their evaluation."""
TOOLS: dict[str, Tool] = {"move objects": "move", "mask a patch": "mask"}
INTRODUCTION = """# Policies on a tabletop
Every policy acts on its own copy of the same scene. **Orange**: where it plans to move its hand. **Reads**: the image that it
received and the attention of its action head over it. **Imagines**: the present moment in its predicted video.
Drag an object to move it on every table, or drag a rectangle to mask that patch of the image for every policy. Clicking
the two points works too. Under a mask, the **white** path is the plan of the same policy without the mask."""
STYLE = """<style>
.agra img { width: 100%; display: block; border-radius: 4px; }
.agra .camera { cursor: crosshair; touch-action: none; user-select: none; -webkit-user-drag: none; }
.agra .two { display: grid; grid-template-columns: 1fr 1fr; gap: 8px; margin-top: 8px; }
.agra figure { margin: 0; } .agra figcaption { font-size: 0.85em; margin-top: 2px; }
.agra h3 { margin: 0 0 6px 0; } .agra .absent { padding: 2em 0.5em; text-align: center; opacity: 0.7; }
</style>"""
POINTER = """
let start = null;
const at = event => {
    const box = element.querySelector('.camera').getBoundingClientRect();
    const within = value => Math.min(Math.max(value, 0), 0.9999);
    return [within((event.clientX - box.left) / box.width), within((event.clientY - box.top) / box.height)];
};
element.addEventListener('dragstart', event => event.preventDefault());
element.addEventListener('pointerdown', event => { if (event.target.matches('.camera')) start = at(event); });
window.addEventListener('pointerup', event => {
    if (start && element.isConnected) trigger('click', {start: start, end: at(event)});
    start = null;
});
"""
"""Sends where the pointer went down and up on the camera's image, as fractions of its width and height."""


def build_page(policies: Sequence[str], open_policy: OpenPolicy) -> gr.Blocks:
    """Build the page. Call `launch` on the result. Raises what `Session` raises, before any visitor comes."""
    return _Page(policies, open_policy).blocks


class _Page:
    """All sessions run in one thread, which owns the renderers and runs one step or answer at a time."""

    def __init__(self, policies: Sequence[str], open_policy: OpenPolicy) -> None:
        self.policies, self.open_policy, self.trials = tuple(policies), open_policy, all_trials()
        self._thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix="agra-demo")
        self._sessions: dict[str, Session] = {}
        self._thread.submit(lambda: self._new().close()).result()
        self.blocks = self._build()

    def _new(self) -> Session:
        return Session(self.policies, self.open_policy, self.trials[FIRST_TRIAL])

    def _session(self, request: gr.Request) -> Session:
        """The session of the visitor's tab. Call it in the sessions' thread."""
        key = str(request.session_hash)
        if key not in self._sessions:
            self._sessions[key] = self._new()
        return self._sessions[key]

    def _close(self, request: gr.Request) -> None:
        def close() -> None:
            session = self._sessions.pop(str(request.session_hash), None)
            if session is not None:
                session.close()

        self._thread.submit(close).result()

    def _do(self, request: gr.Request, action: Callable[[Session], str]) -> list[Any]:
        """Run `action` and draw. An action that the scene does not allow only shows its message."""

        def run() -> list[Any]:
            session = self._session(request)
            try:
                message = action(session)
            except ValueError as error:
                message = f"⚠ {error}"
            return [message, *self._draw(session)]

        return self._thread.submit(run).result()

    def _draw(self, session: Session) -> list[str]:
        return [_panel(session, player) for player in session.players]

    # --- events -------------------------------------------------------------------------------------------------------

    def _set_scene(self, action: Callable[[Session], str], request: gr.Request) -> list[Any]:
        """Start another scene. Its instructions and objects replace those of the lists."""

        def start(session: Session) -> str:
            session.playing = False
            return action(session)

        message, *panels = self._do(request, start)
        session = self._sessions[str(request.session_hash)]
        instructions = gr.Dropdown(choices=session.instructions, value=session.trial.instruction)
        return [instructions, gr.Dropdown(choices=session.objects, value=None), message, *panels]

    def _play(self, request: gr.Request) -> Iterator[list[Any]]:
        """Act until every episode has ended or the visitor pauses, at most in real time."""
        session = self._thread.submit(self._session, request).result()
        session.playing = True

        def step() -> list[Any]:
            session.step()
            speed = f"{session.rate:.1f} control steps a second without the page; shown in real time, {Tabletop.fps} at most"
            return [speed, *self._draw(session)]

        while session.playing and not session.finished:
            start = time.perf_counter()
            yield self._thread.submit(step).result()
            time.sleep(max(0.0, 1 / Tabletop.fps - (time.perf_counter() - start)))
        session.playing = False

    def _pause(self, request: gr.Request) -> None:
        session = self._sessions.get(str(request.session_hash))
        if session is not None:
            session.playing = False

    def _point(self, player: int, tool: str, event: gr.EventData, request: gr.Request) -> list[Any]:
        """Use the pointer's tool. The list of objects shows the one that is now selected."""

        def use(session: Session) -> str:
            height, width = session.players[player].simulator.frame_size
            start, end = ((int(width * x), int(height * y)) for x, y in (event.start, event.end))
            return session.point(player, start, end, TOOLS[tool])

        shown = self._do(request, use)
        return [self._sessions[str(request.session_hash)].selected, *shown]

    # --- layout -------------------------------------------------------------------------------------------------------

    def _build(self) -> gr.Blocks:
        with gr.Blocks(title="agra demo", analytics_enabled=False, fill_width=True) as blocks:
            gr.HTML(STYLE, padding=False)
            gr.Markdown(INTRODUCTION)
            with gr.Row():
                scene = gr.Dropdown(
                    list(self.trials), value=FIRST_TRIAL, label="Scene (trials of the evaluation)", scale=2
                )
                instruction = gr.Dropdown([], label="Instruction: pick one or type", allow_custom_value=True)
                tool = gr.Radio(list(TOOLS), value="move objects", label="Mouse")
                thing = gr.Dropdown([], value=None, label="Object to move with the next click")
            with gr.Row():
                play, pause = gr.Button("Play", variant="primary"), gr.Button("Pause")
                restart, random = gr.Button("Restart"), gr.Button("Random scene")
                clear = gr.Button("Clear mask")
            with gr.Row():
                message, rate = gr.Markdown(elem_id="message"), gr.Markdown(elem_id="rate")
            panels = []
            with gr.Row():
                for index, _ in enumerate(self.policies):
                    with gr.Column(min_width=320):
                        panels.append(gr.HTML(js_on_load=POINTER, elem_classes=["agra"], elem_id=f"player-{index}"))
            shown, listed = [message, *panels], [instruction, thing, message, *panels]
            quick: Any = {"show_progress": "hidden", "concurrency_limit": None, "api_visibility": "private"}

            def on_load(request: gr.Request) -> list[Any]:
                return self._set_scene(lambda session: session.restart(), request)

            def on_scene(name: str, request: gr.Request) -> list[Any]:
                return self._set_scene(lambda session: session.reset(self.trials[name]), request)

            def on_random(request: gr.Request) -> list[Any]:
                return self._set_scene(lambda session: session.random(time.time_ns() % 100_000), request)

            def on_instruction(text: str | None, request: gr.Request) -> list[Any]:
                return self._do(request, lambda session: session.instruct(text or ""))

            def on_restart(request: gr.Request) -> list[Any]:
                return self._do(request, Session.restart)

            def on_clear(request: gr.Request) -> list[Any]:
                return self._do(request, Session.clear_mask)

            def on_thing(name: str | None, request: gr.Request) -> list[Any]:
                return self._do(request, lambda session: session.select(name))

            blocks.load(on_load, outputs=listed, **quick)
            blocks.unload(self._close)
            scene.input(on_scene, scene, listed, **quick)
            random.click(on_random, outputs=listed, **quick)
            instruction.input(on_instruction, instruction, shown, **quick)
            play.click(self._play, outputs=[rate, *panels], **quick)
            pause.click(self._pause, **quick)
            restart.click(on_restart, outputs=shown, **quick)
            clear.click(on_clear, outputs=shown, **quick)
            thing.input(on_thing, thing, shown, **quick)
            for index, panel in enumerate(panels):
                panel.click(self._pointer(index), tool, [thing, *shown], **quick)
        return blocks

    def _pointer(self, player: int) -> Callable[..., list[Any]]:
        def on_pointer(tool: str, event: gr.EventData, request: gr.Request) -> list[Any]:
            return self._point(player, tool, event, request)

        return on_pointer


def _panel(session: Session, player: Player) -> str:
    """A policy's pictures and figures as HTML."""
    parts = [f"<h3>{escape(player.name)}: {_state(player)}</h3>"]
    alt = f"camera of {escape(player.name)}"
    view = photo_uri(pictures.camera(player, session.mask, session.corner))
    parts.append(f'<img class="camera" draggable="false" alt="{alt}" src="{view}">')
    parts.append('<div class="two">')
    parts.append(_figure(pictures.read(player), "Reads", _reading(player)))
    imagined = player.imagined
    if imagined is None:
        parts.append('<div class="absent">This policy predicts no video.</div>')
    else:
        parts.append(_figure(pictures.enlarged(imagined, 2), "Imagines", ""))
    return "".join([*parts, "</div>"])


def _figure(image: Any, title: str, text: str) -> str:
    caption = f"<b>{title}</b> {text}"
    return f'<figure><img alt="{title}" src="{photo_uri(image)}"><figcaption>{caption}</figcaption></figure>'


def _state(player: Player) -> str:
    if player.success:
        return f"success after {player.steps / Tabletop.fps:.1f} s"
    if player.finished:
        return f"{'no success' if player.judged else 'ended'} after {player.steps / Tabletop.fps:.1f} s"
    return f"{player.steps / Tabletop.fps:.1f} s"


def _reading(player: Player) -> str:
    answer, parts = player.answer, []
    if answer.attention is None:
        parts.append("no attention to show")
    else:
        on_mask, uniform = answer.attention.on_mask, answer.attention.uniform_on_mask
        parts.append(f"{on_mask:.0%} of the attention to this image on hand and object (uniform: {uniform:.0%})")
    if answer.deviation is not None:
        parts.append(f"the mask changes the plan by {answer.deviation:.2f}")
    return ", ".join(parts)
