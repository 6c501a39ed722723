"use strict";
for (const frame of document.querySelectorAll("[data-compare]")) {
  const range = frame.querySelector("input");
  const show = () => {
    const at = Number(range.value);
    frame.style.setProperty("--at", at + "%");
    frame.dataset.side = at < 18 ? "left" : at > 82 ? "right" : "";
    range.setAttribute("aria-valuetext", at + " % source, " + (100 - at) + " % merged");
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
