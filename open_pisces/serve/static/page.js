// The playground: one conversation with the server's own /v1/chat/completions. No library, no outside request.

const at = (id) => document.getElementById(id);
const EXAMPLES = ["a red heart on a blue background", "two green frogs", "a cat left of a dog", "three yellow stars"];
const COMMANDS = { "/draw": "image", "/say": "text" };
const MODALITIES = { auto: ["text", "image"], image: ["image"], text: ["text"] };

let messages = []; // as the server takes them
let attached = []; // data URLs
let running = null; // AbortController of the answer that is being made
let model = "pisces";

function element(name, properties = {}, ...children) {
  const made = Object.assign(document.createElement(name), properties);
  made.append(...children);
  return made;
}

function tell(text) {
  at("status").textContent = text;
}

function scrollDown() {
  at("log").scrollTop = at("log").scrollHeight;
}

// ------------------------------------------------------------------------------------------------- what is sent

function numberOf(id) {
  const text = at(id).value.trim();
  return text === "" ? undefined : Number(text);
}

function requestOf(conversation, mode) {
  const seed = numberOf("seed") ?? crypto.getRandomValues(new Uint32Array(1))[0];
  const body = { model, messages: conversation, modalities: MODALITIES[mode], stream: true, seed, partial_images: 3 };
  const images = numberOf("n") ?? 1;
  if (images > 1) body.n_images = images;
  for (const name of ["steps", "guidance_scale", "temperature"]) {
    const value = numberOf(name);
    if (value !== undefined) body[name] = value;
  }
  return body;
}

function callOf(body) {
  const plain = { ...body };
  delete plain.stream;
  delete plain.partial_images;
  const json = JSON.stringify(plain, null, 1).replaceAll("'", "'\\''");
  return `curl ${location.origin}/v1/chat/completions \\\n  -H 'Content-Type: application/json' \\\n  -d '${json}'`;
}

// A model that was trained on single turns only is not helped by what was said before.
function conversationOf(message, mode) {
  if (at("remember").checked) return [...messages];
  const last = messages.at(-2)?.content;
  const pictures = Array.isArray(last) ? last.filter((part) => part.type === "image_url").slice(-1) : [];
  if (mode !== "text" || typeof message.content !== "string" || pictures.length === 0) return [message];
  return [{ role: "user", content: [...pictures, { type: "text", text: message.content }] }];
}

function contentOf(text) {
  if (attached.length === 0) return text;
  const pictures = attached.map((url) => ({ type: "image_url", image_url: { url } }));
  return text ? [...pictures, { type: "text", text }] : pictures;
}

// ---------------------------------------------------------------------------------------------- what is shown

function showMine(content) {
  const box = element("div", { className: "message user" });
  const parts = typeof content === "string" ? [{ type: "text", text: content }] : content;
  const pictures = element("div", { className: "pictures" });
  for (const part of parts) {
    if (part.type === "text") continue;
    const image = element("img", { src: part.image_url.url, alt: "attached picture" });
    image.onload = () => image.classList.toggle("small", image.naturalWidth < 200);
    pictures.append(element("figure", {}, image));
  }
  if (pictures.children.length) box.append(pictures);
  for (const part of parts) if (part.type === "text") box.append(element("p", { textContent: part.text }));
  at("log").append(box);
  scrollDown();
}

class Answer {
  constructor(body, words) {
    this.body = body;
    this.words = words;
    this.text = "";
    this.files = [];
    this.figures = new Map();
    this.line = element("p");
    this.pictures = element("div", { className: "pictures" });
    this.box = element("div", { className: "message assistant" }, this.line, this.pictures);
    this.box.setAttribute("aria-busy", "true");
    at("log").append(this.box);
  }

  say(piece) {
    this.text += piece;
    this.line.textContent = this.text;
    scrollDown();
  }

  show(index, url, finished) {
    if (!this.figures.has(index)) {
      const image = element("img", { alt: `drawing of: ${this.words}` });
      const figure = element("figure", { className: "unfinished" }, image, element("figcaption", { textContent: "drawing ..." }));
      this.figures.set(index, figure);
      this.pictures.append(figure);
    }
    const figure = this.figures.get(index);
    const image = figure.querySelector("img");
    image.onload = () => image.classList.toggle("small", image.naturalWidth < 200);
    image.src = url;
    if (finished) this.finish(figure, index, url);
    scrollDown();
  }

  finish(figure, index, url) {
    figure.classList.remove("unfinished");
    this.files.push(url);
    const button = (text, label, action) => element("button", { type: "button", textContent: text, ariaLabel: label, onclick: action });
    const save = element("a", { href: url, download: `pisces-${this.body.seed}-${index}.png`, textContent: "Save" });
    figure.querySelector("figcaption").replaceChildren(
      element("span", { textContent: `seed ${this.body.seed}` + (index ? `, picture ${index + 1}` : "") }),
      button("Ask", "Ask about this picture", () => attach(url)),
      save,
    );
  }

  done() {
    this.box.removeAttribute("aria-busy");
    for (const figure of this.figures.values()) if (figure.classList.contains("unfinished")) figure.remove();
    const tools = element("p", { className: "tools" });
    const again = element("button", { type: "button", textContent: "Again", title: "The same with another seed" });
    again.onclick = () => this.again();
    const copy = element("button", { type: "button", textContent: "Copy as API call" });
    copy.onclick = async () => {
      await navigator.clipboard.writeText(callOf(this.body));
      tell("The call is in the clipboard.");
    };
    tools.append(again, " ", copy);
    this.box.append(tools);
    scrollDown();
  }

  fail(message) {
    this.box.classList.add("wrong");
    this.line.textContent = message;
    this.box.removeAttribute("aria-busy");
  }

  again() {
    if (running) return;
    const place = messages.indexOf(this.message);
    if (place >= 0) messages = messages.slice(0, place);
    while (this.box.nextSibling) this.box.nextSibling.remove();
    this.box.remove();
    const body = { ...this.body, seed: crypto.getRandomValues(new Uint32Array(1))[0] };
    answer(body, this.words);
  }

  // As the server wrote it: words, or pictures.
  remember() {
    const pictures = this.files.map((url) => ({ type: "image_url", image_url: { url } }));
    this.message = { role: "assistant", content: pictures.length ? pictures : this.text };
    messages.push(this.message);
  }
}

// -------------------------------------------------------------------------------------------------- an answer

async function* events(response) {
  const reader = response.body.pipeThrough(new TextDecoderStream()).getReader();
  let rest = "";
  for (;;) {
    const { value, done } = await reader.read();
    if (done) return;
    rest += value;
    const parts = rest.split("\n\n");
    rest = parts.pop();
    for (const part of parts) {
      const data = part.split("\n").find((line) => line.startsWith("data: "))?.slice(6);
      if (data && data !== "[DONE]") yield JSON.parse(data);
    }
  }
}

function take(event, shown) {
  if (event.error) throw new Error(event.error.message);
  const delta = event.choices?.[0]?.delta ?? {};
  if (typeof delta.content === "string") shown.say(delta.content);
  if (delta.partial_image) shown.show(delta.partial_image.index, delta.partial_image.image_url.url, false);
  for (const picture of delta.images ?? []) shown.show(picture.index, picture.image_url.url, true);
}

async function answer(body, words) {
  running = new AbortController();
  at("send").textContent = "Stop";
  const began = performance.now();
  const shown = new Answer(body, words);
  tell("Thinking ...");
  try {
    const headers = { "content-type": "application/json" };
    const asked = { method: "POST", headers, body: JSON.stringify(body), signal: running.signal };
    const response = await fetch("v1/chat/completions", asked);
    if (!response.ok) throw new Error((await response.json()).error.message);
    for await (const event of events(response)) take(event, shown);
    shown.remember();
    tell(`Done in ${((performance.now() - began) / 1000).toFixed(1)} s.`);
  } catch (error) {
    if (error.name === "AbortError") {
      tell("Stopped.");
      if (shown.text || shown.files.length) shown.remember();
    } else {
      shown.fail(error.message);
      tell("");
    }
  }
  shown.done();
  running = null;
  at("send").textContent = "Send";
}

function send() {
  if (running) {
    running.abort();
    return;
  }
  let text = at("words").value.trim();
  let mode = document.querySelector("input[name=mode]:checked").value;
  const command = text.split(/\s/, 1)[0];
  if (command in COMMANDS) {
    mode = COMMANDS[command];
    text = text.slice(command.length).trim();
  }
  if (!text && attached.length === 0) {
    tell("Say what to draw, or add a picture and ask about it.");
    return;
  }
  at("hello")?.remove();
  const message = { role: "user", content: contentOf(text) };
  messages.push(message);
  showMine(message.content);
  at("words").value = "";
  attached = [];
  listAttached();
  grow();
  answer(requestOf(conversationOf(message, mode), mode), text);
}

// --------------------------------------------------------------------------------------------------- pictures in

function attach(url) {
  attached.push(url);
  listAttached();
  at("words").focus();
}

function listAttached() {
  at("attached").replaceChildren(
    ...attached.map((url, index) => {
      const remove = element("button", { type: "button", textContent: "×", ariaLabel: "Remove this picture" });
      remove.onclick = () => {
        attached.splice(index, 1);
        listAttached();
      };
      return element("li", {}, element("img", { src: url, alt: `attached picture ${index + 1}` }), remove);
    }),
  );
}

function attachFiles(files) {
  for (const file of files) {
    if (!file.type.startsWith("image/")) continue;
    const reader = new FileReader();
    reader.onload = () => attach(reader.result);
    reader.readAsDataURL(file);
  }
}

// --------------------------------------------------------------------------------------------------------- events

function grow() {
  at("words").style.height = "auto";
  at("words").style.height = `${at("words").scrollHeight + 2}px`;
}

at("composer").addEventListener("submit", (event) => {
  event.preventDefault();
  send();
});
at("words").addEventListener("input", grow);
at("words").addEventListener("keydown", (event) => {
  if (event.key === "Enter" && !event.shiftKey && !event.isComposing) {
    event.preventDefault();
    if (!running) send();
  }
});
document.addEventListener("keydown", (event) => {
  if (event.key === "Escape" && running) running.abort();
});
at("file").addEventListener("change", () => {
  attachFiles(at("file").files);
  at("file").value = "";
});
document.addEventListener("paste", (event) => attachFiles(event.clipboardData.files));
document.addEventListener("dragover", (event) => {
  event.preventDefault();
  document.body.classList.add("dropping");
});
document.addEventListener("dragleave", (event) => {
  if (!event.relatedTarget) document.body.classList.remove("dropping");
});
document.addEventListener("drop", (event) => {
  event.preventDefault();
  document.body.classList.remove("dropping");
  attachFiles(event.dataTransfer.files);
});
at("clear").addEventListener("click", () => {
  if (running) running.abort();
  messages = [];
  at("log").replaceChildren();
  tell("");
  at("words").focus();
});
for (const words of EXAMPLES) {
  const button = element("button", { type: "button", textContent: words });
  button.onclick = () => {
    at("words").value = words;
    send();
  };
  at("examples").append(element("li", {}, button));
}

const listed = await fetch("v1/models");
if (listed.ok) {
  const entry = (await listed.json()).data[0];
  model = entry.id;
  at("remember").checked = entry.converses;
  at("model").textContent = model;
}
