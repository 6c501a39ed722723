"use strict";
const data = JSON.parse(document.getElementById("data").textContent);
const find = (id) => document.getElementById(id);

for (const frame of document.querySelectorAll("[data-compare]")) {
  const range = frame.querySelector("input");
  const name = (side) => frame.querySelector(".tag." + side).textContent;
  const show = () => {
    const at = Number(range.value);
    frame.style.setProperty("--at", at + "%");
    frame.dataset.side = at < 18 ? "left" : at > 82 ? "right" : "";
    const spoken = at + " % " + name("left") + ", " + (100 - at) + " % " + name("right");
    range.setAttribute("aria-valuetext", spoken);
  };
  const follow = (event) => {
    const box = frame.getBoundingClientRect();
    range.value = String(Math.round(((event.clientX - box.left) / box.width) * 100));
    show();
  };
  range.addEventListener("input", show);
  // Not every browser moves a range to where its track is touched.
  range.addEventListener("pointerdown", follow);
  range.addEventListener("pointermove", (event) => {
    if (event.buttons & 1) follow(event);
  });
  show();
}

for (const button of document.querySelectorAll(".copy")) {
  const code = button.parentElement.querySelector("code");
  button.hidden = !navigator.clipboard;
  button.addEventListener("click", async () => {
    await navigator.clipboard.writeText(code.textContent).then(
      () => { button.textContent = "Copied"; },
      () => { button.textContent = "Select it and copy"; },
    );
    setTimeout(() => { button.textContent = "Copy"; }, 1600);
  });
}

let sample = 0;
const samples = find("sample");
const panels = find("panel");
for (const controls of document.querySelectorAll(".controls")) controls.hidden = false;

function showSample(index) {
  sample = index;
  samples.value = String(index);
  for (const element of document.querySelectorAll("#grid [data-of]")) {
    element.hidden = Number(element.dataset.of) !== index;
  }
}

function showPanel(index) {
  for (const panel of document.querySelectorAll("[data-panel]")) {
    panel.hidden = Number(panel.dataset.panel) !== index;
  }
}

if (samples) {
  const step = (by) => showSample((sample + by + samples.length) % samples.length);
  samples.addEventListener("change", () => showSample(Number(samples.value)));
  find("sample-before").addEventListener("click", () => step(-1));
  find("sample-after").addEventListener("click", () => step(1));
  // A browser may remember the choice of an earlier visit.
  showSample(Number(samples.value));
}
if (panels) {
  panels.addEventListener("change", () => showPanel(Number(panels.value)));
  showPanel(Number(panels.value));
}

const dialog = find("dialog");
const frame = dialog.querySelector("[data-compare]");
const range = frame.querySelector("input");
let opened = null;

const made = (tag, text) => {
  const element = document.createElement(tag);
  element.textContent = text;
  return element;
};

function pictureOf(place, index) {
  return place && [...place.querySelectorAll("img")].find(
    (image) => image.dataset.of === undefined || Number(image.dataset.of) === index,
  );
}

function givenOf(button, index, kind) {
  const row = button.closest("tr").querySelector('[data-given="' + kind + '"]');
  const alone = document.querySelector('.given [data-given="' + kind + '"][data-of="' + index + '"]');
  const place = row || alone;
  return place ? place.querySelector("img") : null;
}

function putSides() {
  const index = Number(opened.dataset.sample ?? sample);
  const cell = data.cells[opened.dataset.cell];
  const reference = givenOf(opened, index, "reference");
  find("dialog-sides").hidden = !reference;
  const chosen = dialog.querySelector("[name=side]:checked").value;
  const kind = reference && chosen === "reference" ? "reference" : "source";
  const left = kind === "reference" ? reference : givenOf(opened, index, "source");
  const right = pictureOf(opened, index);
  frame.hidden = !right;
  find("dialog-empty").hidden = Boolean(right);
  // With nothing to compare with, the cell's picture is there alone.
  frame.classList.toggle("alone", !left);
  if (right) {
    frame.classList.toggle("tiny", right.classList.contains("tiny"));
    for (const [id, image, alt] of [["dialog-left", left || right, kind], ["dialog-right", right, cell.label]]) {
      const target = find(id);
      target.src = image.src;
      target.alt = alt;
      // Both fill the same frame.
      for (const side of ["width", "height"]) target.setAttribute(side, right.getAttribute(side));
    }
  }
  frame.querySelector(".tag.left").textContent = kind === "reference" ? "Reference" : "Source";
  frame.querySelector(".tag.right").textContent = cell.label;
  range.dispatchEvent(new Event("input"));
}

function openCell(button) {
  opened = button;
  const index = Number(button.dataset.sample ?? sample);
  const cell = data.cells[button.dataset.cell];
  find("dialog-title").textContent = cell.label;
  find("dialog-sample").textContent = data.samples[index].name;
  find("dialog-about").textContent = data.samples[index].about;
  dialog.querySelector("[data-copied]").textContent = cell.command;
  find("dialog-facts").replaceChildren(...cell.facts.map(([name, value]) => {
    const fact = document.createElement("div");
    fact.append(made("dt", name), made("dd", value));
    return fact;
  }));
  find("dialog-measures").replaceChildren(...cell.measures.map((measure) => {
    const row = document.createElement("tr");
    const head = made("th", measure.title);
    head.scope = "row";
    row.append(head, made("td", measure.samples[index] ?? "–"), made("td", measure.mean));
    return row;
  }));
  putSides();
  if (!dialog.open) dialog.showModal();
}

const shots = () => [...document.querySelectorAll(".shot")].filter((shot) => shot.offsetParent);

function stepCell(by) {
  const all = shots();
  const index = Number(opened.dataset.sample ?? sample);
  const same = all.filter((shot) => Number(shot.dataset.sample ?? sample) === index);
  openCell(same[(same.indexOf(opened) + by + same.length) % same.length]);
}

for (const shot of document.querySelectorAll(".shot")) {
  shot.addEventListener("click", () => {
    range.value = "50";
    openCell(shot);
    range.focus();
  });
}
for (const side of dialog.querySelectorAll("[name=side]")) side.addEventListener("change", putSides);
find("cell-before").addEventListener("click", () => stepCell(-1));
find("cell-after").addEventListener("click", () => stepCell(1));
find("dialog-close").addEventListener("click", () => dialog.close());
// The dialog's own box has no room beside its content: this is its backdrop.
dialog.addEventListener("click", (event) => {
  if (event.target === dialog) dialog.close();
});
