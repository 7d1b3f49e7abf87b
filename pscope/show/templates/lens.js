"use strict";
(() => {
  const page = JSON.parse(document.getElementById("data").textContent);
  const grid = document.getElementById("grid"), detail = document.getElementById("detail");
  const pins = document.getElementById("pins"), found = document.getElementById("found");
  const status = document.getElementById("status");
  const [lensChoice, measureChoice, search] = ["lens", "measure", "search"].map((id) => document.getElementById(id));
  const height = page.layers.length, width = page.tokens.length;
  // The top row is the last layer.
  const cells = [...grid.tBodies[0].rows].reverse().map((row) => [...row.cells].slice(1));
  const pinned = new Set();
  let here = [height - 1, width - 1];

  const lens = () => page.lenses[lensChoice.value];
  const read = (layer, place) => lens().cells[place][layer];
  const words = (cell) => cell.tokens.map((number) => page.words[number]);
  const heading = (place) => `${page.tokens[place]} at ${place}`;
  const quoted = (text) => (text === "" ? "(nothing)" : text);
  const measures = {
    probability: (cell) => cell.probabilities[0],
    certainty: (cell) => 1 - cell.entropy / Math.log(page.vocabulary),
    answer: (cell) => 1 - Math.log(cell.rank) / Math.log(page.vocabulary),
    agreement: (cell) => (cell.rank === 1 ? 1 : 0),
  };
  const measure = (cell) => Math.min(1, Math.max(0, measures[measureChoice.value](cell)));

  function element(name, text, attributes = {}) {
    const made = document.createElement(name);
    if (text !== undefined) made.textContent = text;
    for (const [key, value] of Object.entries(attributes)) made.setAttribute(key, value);
    return made;
  }

  const everyCell = (act) => cells.forEach((row, layer) => row.forEach((td, place) => act(td, read(layer, place))));

  function paint() {
    everyCell((td, cell) => {
      const value = cell ? measure(cell) : 0;
      td.firstElementChild.textContent = cell ? words(cell)[0] : "";
      td.style.setProperty("--v", value.toFixed(3));
      td.classList.toggle("deep", value > 0.62);
      td.classList.toggle("agrees", Boolean(cell) && cell.rank === 1);
    });
    find();
    show(...here);
    showPins();
  }

  function find() {
    const sought = search.value.trim().toLowerCase();
    // Words stand once, so that each is looked at once.
    const alike = new Set(page.words.flatMap((word, number) => (word.trim().toLowerCase() === sought ? [number] : [])));
    let hits = 0, cellsRead = 0;
    everyCell((td, cell) => {
      const at = cell && sought ? cell.tokens.findIndex((number) => alike.has(number)) : -1;
      if (at >= 0 || td.title) {
        td.classList.toggle("hit", at >= 0);
        td.title = at >= 0 ? `at rank ${at + 1} here` : "";
      }
      hits += at >= 0 ? 1 : 0;
      cellsRead += cell ? 1 : 0;
    });
    found.textContent = sought ? `in ${hits} of ${cellsRead} cells` : "";
  }

  function plot(values, at, label) {
    const space = "http://www.w3.org/2000/svg";
    const svg = document.createElementNS(space, "svg");
    svg.setAttribute("viewBox", `0 0 ${Math.max(1, values.length - 1)} 1`);
    svg.setAttribute("preserveAspectRatio", "none");
    svg.setAttribute("class", "plot");
    svg.setAttribute("role", "img");
    svg.setAttribute("aria-label", label);
    const line = document.createElementNS(space, "path"), mark = document.createElementNS(space, "line");
    // Each value is a short level piece joined to the next one; where none was read, the line is broken.
    const piece = (value, index) => {
      if (value === null) return "";
      const joined = index > 0 && values[index - 1] !== null;
      return `${joined ? "L" : "M"}${index} ${1 - value}l0.01 0`;
    };
    line.setAttribute("d", values.map(piece).join(""));
    for (const [key, value] of [["x1", at], ["x2", at], ["y1", 0], ["y2", 1]]) mark.setAttribute(key, value);
    svg.append(line, mark);
    return svg;
  }

  function show(layer, place) {
    const cell = read(layer, place);
    const name = `${lens().name}: ${JSON.stringify(page.tokens[place])} at ${place}, layer ${page.layers[layer]}`;
    const parts = [element("h2", name)];
    if (!cell) {
      detail.replaceChildren(...parts, element("p", "This lens does not read this layer."));
      return;
    }
    const bars = element("table", undefined, { class: "bars" });
    words(cell).forEach((word, number) => {
      const row = bars.insertRow(), bar = element("span");
      row.append(element("td", JSON.stringify(word)), element("td", cell.probabilities[number].toFixed(3)));
      bar.style.width = `${100 * cell.probabilities[number]}%`;
      const holder = element("td", undefined, { class: "bar" });
      holder.append(bar);
      row.append(holder);
    });
    const facts = element("dl");
    const tell = (term, told) => facts.append(element("dt", term), element("dd", told));
    if (cell.continuation !== null) tell("goes on", quoted(cell.continuation));
    tell("the model's own answer", `${JSON.stringify(page.answers[place])}, here at rank ${cell.rank}`);
    tell("entropy", `${cell.entropy.toFixed(2)} nats`);
    if (lens().clean) {
      tell("the prompt unpatched says", lens().clean.continuation ?? JSON.stringify(page.words[lens().clean.tokens[0]]));
    }
    const measured = (each) => (each ? measure(each) : null);
    const column = page.layers.map((_, each) => measured(read(each, place)));
    const row = page.tokens.map((_, each) => measured(read(layer, each)));
    const label = measureChoice.selectedOptions[0].textContent;
    parts.push(bars, facts, element("p", `${label}, over the layers of this token`), plot(column, layer, `${label} over layers`));
    parts.push(element("p", `and over the tokens of this layer`), plot(row, place, `${label} over tokens`));
    detail.replaceChildren(...parts);
  }

  function showPins() {
    if (!pinned.size) {
      pins.replaceChildren();
      return;
    }
    const table = element("table"), head = table.createTHead().insertRow();
    head.append(element("th", "layer", { scope: "col" }));
    for (const place of pinned) head.append(element("th", heading(place), { scope: "col" }));
    const body = table.createTBody();
    for (let layer = height - 1; layer >= 0; layer--) {
      const row = body.insertRow();
      row.append(element("th", page.layers[layer], { scope: "row" }));
      for (const place of pinned) {
        const cell = read(layer, place);
        row.append(element("td", cell ? quoted(cell.continuation ?? words(cell)[0]) : "(not read)"));
      }
    }
    pins.replaceChildren(element("h2", "Pinned paths"), table);
  }

  function settle(layer, place) {
    // Of all cells, the tab key leads to one.
    cells[here[0]][here[1]].tabIndex = -1;
    here = [layer, place];
    cells[layer][place].tabIndex = 0;
    show(layer, place);
    const cell = read(layer, place);
    const says = cell ? `${words(cell)[0]}, ${cell.probabilities[0].toFixed(2)}` : "not read";
    status.textContent = `${heading(place)}, layer ${page.layers[layer]}: ${says}`;
  }

  function move(layer, place) {
    settle(Math.min(height - 1, Math.max(0, layer)), Math.min(width - 1, Math.max(0, place)));
    cells[here[0]][here[1]].focus();
  }

  function pin(...places) {
    for (const place of places) {
      pinned.has(place) ? pinned.delete(place) : pinned.add(place);
      for (const row of cells) {
        row[place].classList.toggle("pinned", pinned.has(place));
        row[place].setAttribute("aria-selected", pinned.has(place));
      }
    }
    showPins();
  }

  const placeOf = (target) => {
    const td = target.closest("#grid tbody td");
    return td && [height - 1 - (td.parentElement.rowIndex - 1), td.cellIndex - 1];
  };
  const steps = { ArrowUp: [1, 0], ArrowDown: [-1, 0], ArrowLeft: [0, -1], ArrowRight: [0, 1] };
  grid.addEventListener("mouseover", (event) => {
    const at = placeOf(event.target);
    if (at) show(...at);
  });
  grid.addEventListener("mouseleave", () => show(...here));
  grid.addEventListener("focusin", (event) => {
    const at = placeOf(event.target);
    if (at) settle(...at);
  });
  grid.addEventListener("click", (event) => {
    const at = placeOf(event.target);
    if (at) {
      move(...at);
      pin(at[1]);
    }
  });
  grid.addEventListener("keydown", (event) => {
    if (event.altKey || event.ctrlKey || event.metaKey) return;
    const step = steps[event.key];
    if (step) move(here[0] + step[0], here[1] + step[1]);
    else if (event.key === "Home") move(here[0], 0);
    else if (event.key === "End") move(here[0], width - 1);
    else if (event.key === "Enter" || event.key === " ") pin(here[1]);
    else if (event.key === "Escape") pin(...pinned);
    else return;
    event.preventDefault();
  });
  for (const control of [lensChoice, measureChoice]) control.addEventListener("input", paint);
  search.addEventListener("input", find);
  document.getElementById("controls").addEventListener("submit", (event) => event.preventDefault());
  cells[here[0]][here[1]].tabIndex = 0;
  paint();
})();
