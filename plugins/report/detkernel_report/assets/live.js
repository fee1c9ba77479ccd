"use strict";
// Asks the server that this page came from whether the run has gone on, and renews what is shown.
(() => {
  const EVERY = 2000;
  let version = document.body.dataset.version, failed = 0;
  const note = document.createElement("p");
  note.className = "dim";
  note.setAttribute("role", "status");
  note.textContent = "Live: renews itself while the run goes on.";
  document.body.insertBefore(note, document.querySelector("header"));
  note.id = "live";

  async function get(path) {
    const answer = await fetch(path, { cache: "no-store" });
    if (!answer.ok) throw new Error(await answer.text());
    return answer;
  }

  async function look() {
    try {
      const now = await (await get("/version")).text();
      if (now !== version) {
        const parts = await (await get("/parts")).json();
        renew(parts);
        version = parts.version;
      }
      if (failed) note.textContent = "Live again.";
      failed = 0;
    } catch (error) {
      failed += 1;
      if (failed === 2) note.textContent = `No longer live: ${error.message || "the server does not answer"}`;
    }
    setTimeout(look, Math.min(EVERY * (1 + failed), 30000));
  }

  function renew(parts) {  // what was unfolded stays so, and the page does not jump
    const open = new Set([...document.querySelectorAll("main details[open]")].map(key));
    for (const [name, text] of [["header", parts.header], ["main", parts.main]]) {
      const fresh = new DOMParser().parseFromString(text, "text/html").body;
      document.querySelector(name).replaceChildren(...fresh.childNodes);
    }
    for (const one of document.querySelectorAll("main details")) one.open = one.open || open.has(key(one));
    window.enhance(document.querySelector("main"));
  }

  function key(details) {
    const section = details.closest("section"), title = details.closest("figure")?.querySelector("h3");
    return [section?.getAttribute("aria-labelledby"), title?.textContent, details.querySelector("summary").textContent].join("/");
  }
  setTimeout(look, EVERY);
})();
