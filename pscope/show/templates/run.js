"use strict";
(() => {
  const PAGE = 100, FEW = 40;
  const get = (id) => document.getElementById(id);
  const tables = JSON.parse(get("data").textContent).tables;
  const arrays = { 1: Uint8Array, 2: Uint16Array, 4: Uint32Array };
  let table, columns, columnsShown, rows = [], first = 0, sortedBy = null, downwards = false, pair = null;

  function element(name, text, attributes = {}) {
    const made = document.createElement(name);
    if (text !== undefined) made.textContent = text;
    for (const [key, value] of Object.entries(attributes)) made.setAttribute(key, value);
    return made;
  }

  function unpacked(column) {
    const bytes = Uint8Array.from(atob(column.packed), (letter) => letter.charCodeAt(0));
    if (column.kind === "number") {
      const numbers = new Float32Array(bytes.buffer);
      return { ...column, at: (row) => (Number.isNaN(numbers[row]) ? null : numbers[row]) };
    }
    const codes = new arrays[column.size](bytes.buffer);
    return { ...column, codes, at: (row) => (codes[row] ? column.values[codes[row] - 1] : null) };
  }

  const written = (value) => (value === null ? "" : typeof value === "number" && !Number.isInteger(value) ? value.toPrecision(4) : String(value));
  const value = (name, row) => columns.get(name)?.at(row) ?? null;
  // What is missing comes last.
  const compare = (a, b) => (a === null ? 1 : b === null ? -1 : a < b ? -1 : a > b ? 1 : 0);
  const every = () => [...Array(table.rows).keys()];
  const distinct = (name, among) => [...new Set(among.map((row) => value(name, row)))].filter((each) => each !== null).sort(compare);

  function choose(number) {
    table = tables[number];
    columns = new Map(table.columns.map((column) => [column.name, unpacked(column)]));
    // What is the same in all rows is told once.
    const same = [...columns.values()].filter((column) => column.values?.length === 1 && column.codes.every((code) => code === 1));
    get("same").textContent = same.length && table.rows > 1 ? `in all rows: ${same.map((column) => `${column.name} ${written(column.values[0])}`).join(", ")}` : "";
    columnsShown = [...columns.values()].filter((column) => table.rows === 1 || !(same.includes(column) || column.values?.length === 0));
    sortedBy = pair = null;
    const brief = (column) => column.values?.length > 1 && column.values.length <= FEW && column.values.every((each) => written(each).length <= FEW);
    const filters = [...columns.values()].filter((column) => brief(column) && (column.kind !== "whole" || column.name.endsWith("layer")));
    get("filters").replaceChildren(...filters.map((column) => {
      const select = element("select", undefined, { "data-column": column.name });
      select.append(element("option", "all", { value: "" }));
      const order = column.values.map((_, code) => code).sort((a, b) => compare(column.values[a], column.values[b]));
      for (const code of order) select.append(element("option", written(column.values[code]), { value: code + 1 }));
      const label = element("label", `${column.name} `);
      label.append(select);
      return label;
    }));
    get("measure").replaceChildren(...table.measures.map((name) => element("option", name)));
    get("of").replaceChildren(...table.grid.map((name) => {
      const select = element("select", undefined, { "data-of": name });
      // What is patched and its controls are never averaged together.
      const read = distinct(name, every().filter((row) => value("target_layer", row) !== null));
      select.append(...read.map((each) => element("option", each)));
      if (read.includes("patched")) select.value = "patched";
      const label = element("label", `${name} `);
      label.append(select);
      return label;
    }));
    get("cell").textContent = "";
    get("heat").hidden = !table.pairs || !table.measures.length;
    get("beside").hidden = !table.unit || !table.says;
    get("unit-name").textContent = table.unit ?? "";
    filter();
  }

  // All filters but that of a cell, which is chosen on what they leave.
  function left() {
    const chosen = [...get("filters").querySelectorAll("select")].filter((select) => select.value);
    const wanted = chosen.map((select) => [columns.get(select.dataset.column).codes, Number(select.value)]);
    const sought = get("search").value.trim().toLowerCase();
    const hits = sought ? [...columns.values()].filter((column) => column.kind === "text").map((column) => {
      const found = column.values.map((text) => String(text).toLowerCase().includes(sought));
      return (row) => column.codes[row] > 0 && found[column.codes[row] - 1];
    }) : [];
    const kept = [];
    for (let row = 0; row < table.rows; row++) {
      if (wanted.every(([codes, code]) => codes[row] === code) && (!sought || hits.some((hit) => hit(row)))) kept.push(row);
    }
    return kept;
  }

  function filter() {
    const kept = left();
    const seen = get("heat").hidden ? [] : ofHeat(kept);
    rows = pair ? seen.filter((row) => value("layer", row) === pair[0] && value("target_layer", row) === pair[1]) : kept;
    if (sortedBy) {
      const column = columns.get(sortedBy), sign = downwards ? -1 : 1;
      rows.sort((a, b) => {
        const [one, other] = [column.at(a), column.at(b)];
        return one === null || other === null ? compare(one, other) : sign * compare(one, other);
      });
    }
    first = 0;
    get("count").textContent = `${rows.length} of ${table.rows} rows${pair ? `, layer ${pair[0]} → ${pair[1]}` : ""}`;
    if (!get("heat").hidden) heat(seen);
    if (!get("beside").hidden) {
      offerUnits();
      beside();
    }
    list();
  }

  function list() {
    const head = element("tr");
    for (const { name } of columnsShown) {
      const th = element("th", undefined, { scope: "col", "aria-sort": name !== sortedBy ? "none" : downwards ? "descending" : "ascending" });
      const button = element("button", name + (name !== sortedBy ? "" : downwards ? " ▼" : " ▲"), { type: "button" });
      button.addEventListener("click", () => {
        downwards = name === sortedBy && !downwards;
        sortedBy = name;
        filter();
        get("rows").querySelector("th[aria-sort$=ending] button").focus();
      });
      th.append(button);
      head.append(th);
    }
    const thead = element("thead"), body = element("tbody");
    thead.append(head);
    for (const row of rows.slice(first, first + PAGE)) {
      const line = body.insertRow();
      for (const column of columnsShown) line.append(element("td", written(column.at(row)), { class: column.kind === "number" ? "number" : "" }));
    }
    get("rows").replaceChildren(thead, body);
    get("where").textContent = rows.length ? `${first + 1} to ${Math.min(first + PAGE, rows.length)} of ${rows.length}` : "no rows";
    get("before").disabled = first === 0;
    get("after").disabled = first + PAGE >= rows.length;
  }

  function ofHeat(kept) {
    const wanted = [...get("of").querySelectorAll("select")].map((select) => [select.dataset.of, select.value]);
    return kept.filter((row) => wanted.every(([name, of]) => String(value(name, row)) === of));
  }

  function heat(kept) {
    const measure = columns.get(get("measure").value), cells = new Map();
    for (const row of kept) {
      const [layer, target, number] = [value("layer", row), value("target_layer", row), measure.at(row)];
      if (layer === null || target === null || number === null || !Number.isFinite(Number(number))) continue;
      const key = `${layer},${target}`, cell = cells.get(key) ?? [0, 0];
      cells.set(key, [cell[0] + Number(number), cell[1] + 1]);
    }
    const layers = distinct("layer", kept), targets = distinct("target_layer", kept).reverse();
    const means = [...cells.values()].map(([sum, count]) => sum / count);
    const least = Math.min(0, ...means), span = Math.max(...means, 0) - least || 1;
    const body = element("tbody"), head = element("tr"), foot = element("thead");
    for (const target of targets) {
      const line = body.insertRow();
      line.append(element("th", target, { scope: "row" }));
      for (const layer of layers) {
        const td = element("td", undefined, { tabindex: -1, "data-pair": `${layer},${target}` });
        const cell = cells.get(`${layer},${target}`);
        if (cell) {
          const mean = cell[0] / cell[1];
          td.style.setProperty("--v", ((mean - least) / span).toFixed(3));
        }
        td.title = `layer ${layer} to ${target}: ${cell ? `${(cell[0] / cell[1]).toPrecision(3)}, ${cell[1]} rows` : "no rows"}`;
        td.setAttribute("aria-label", td.title);
        td.classList.toggle("open", Boolean(pair) && pair[0] === layer && pair[1] === target);
        line.append(td);
      }
    }
    head.append(element("th", "ℓ* ↑  ℓ →"), ...layers.map((layer) => element("th", layer, { scope: "col" })));
    foot.append(head);
    get("grid").replaceChildren(foot, body);
    get("shades").textContent = means.length ? `from ${least.toPrecision(3)} (light) to ${(least + span).toPrecision(3)} (dark)` : "no rows";
    const stop = get("grid").querySelector("td.open") ?? get("grid").querySelector("td");
    if (stop) stop.tabIndex = 0;
  }

  function offerUnits() {
    const before = get("unit").value, units = distinct(table.unit, rows).map(String);
    get("unit").replaceChildren(...units.map((each) => element("option", each)));
    if (units.includes(before)) get("unit").value = before;
  }

  function beside() {
    const unit = get("unit").value, cells = new Map(), ways = [], places = [];
    const own = rows.filter((row) => String(value(table.unit, row)) === unit);
    const also = table.also.filter((name) => distinct(name, own).length > 1);
    for (const row of own) {
      const told = [...table.ways.map((name) => value(name, row)), ...also.map((name) => value(name, row) !== null && `${name} ${written(value(name, row))}`)];
      const way = told.filter((each) => each !== null && each !== false).join(", ") || table.says;
      const place = value("layer", row) === null ? "" : written(value("layer", row)) + (table.pairs ? ` → ${written(value("target_layer", row))}` : "");
      if (!ways.includes(way)) ways.push(way);
      if (!places.includes(place)) places.push(place);
      const key = `${place}\n${way}`, texts = cells.get(key) ?? [];
      cells.set(key, texts);
      const says = written(value(table.says, row)), right = value("found", row) === true || value("correct", row) === true;
      if (!texts.some((each) => each.says === says)) texts.push({ says, right });
    }
    const thead = element("thead"), head = element("tr"), body = element("tbody");
    head.append(element("th", "layer", { scope: "col" }), ...ways.map((way) => element("th", way, { scope: "col" })));
    thead.append(head);
    for (const place of places) {
      const line = body.insertRow();
      line.append(element("th", place || "—", { scope: "row" }));
      for (const way of ways) {
        const texts = cells.get(`${place}\n${way}`) ?? [];
        line.append(element("td", texts.map((each) => (each.right ? "✓ " : "") + each.says).join("\n"), { class: texts.some((each) => each.right) ? "right" : "" }));
      }
    }
    get("texts").replaceChildren(thead, body);
  }

  function open(td) {
    const [layer, target] = td.dataset.pair.split(",").map(Number);
    pair = pair && pair[0] === layer && pair[1] === target ? null : [layer, target];
    filter();
    get("cell").textContent = !pair ? "" : rows.length ? `${td.title}; they stand below` : td.title;
    get("grid").querySelector(`td[data-pair="${layer},${target}"]`).focus();
  }

  const cellOf = (event) => event.target.closest("#grid td");
  get("grid").addEventListener("click", (event) => cellOf(event) && open(cellOf(event)));
  get("grid").addEventListener("mouseover", (event) => {
    if (cellOf(event)) get("cell").textContent = cellOf(event).title;
  });
  get("grid").addEventListener("keydown", (event) => {
    const td = cellOf(event);
    if (!td) return;
    const line = td.parentElement, body = line.parentElement;
    const next = {
      ArrowLeft: () => td.previousElementSibling,
      ArrowRight: () => td.nextElementSibling,
      ArrowUp: () => line.previousElementSibling?.cells[td.cellIndex],
      ArrowDown: () => line.nextElementSibling?.cells[td.cellIndex],
    }[event.key]?.();
    if (next?.tagName === "TD" && body.contains(next)) {
      td.tabIndex = -1;
      next.tabIndex = 0;
      next.focus();
      get("cell").textContent = next.title;
    } else if (event.key === "Enter" || event.key === " ") open(td);
    else return;
    event.preventDefault();
  });
  get("table").replaceChildren(...tables.map((each, number) => element("option", `${each.name} (${each.rows})`, { value: number })));
  get("table").addEventListener("input", () => choose(get("table").value));
  for (const id of ["search", "filters", "measure", "of"]) get(id).addEventListener("input", filter);
  get("unit").addEventListener("input", beside);
  get("clear").addEventListener("click", () => {
    get("search").value = "";
    choose(get("table").value);
  });
  get("before").addEventListener("click", () => { first -= PAGE; list(); });
  get("after").addEventListener("click", () => { first += PAGE; list(); });
  document.querySelectorAll("form").forEach((form) => form.addEventListener("submit", (event) => event.preventDefault()));
  if (tables.length) choose(0);
  else get("count").textContent = "nothing is finished yet";
})();
