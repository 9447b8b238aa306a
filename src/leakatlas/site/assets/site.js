/* LeakAtlas: theme, tables (search, filter, sort, deep links), switches, copying. No framework,
   no request: everything works from a folder. */
"use strict";

(() => {
  const announce = (text) => {
    document.getElementById("announce").textContent = text;
  };

  /* --- state in the address: "#letter=D&algorithm=fedavg" ------------------------------------ */

  const readHash = () => {
    const text = location.hash.slice(1);
    return text.includes("=") ? new URLSearchParams(text) : new URLSearchParams();
  };

  const writeHash = (values) => {
    const text = values.toString().replaceAll("%2C", ",");
    // replaceState keeps the back button useful: one entry a page, not one a keystroke.
    history.replaceState(null, "", text ? `#${text}` : location.pathname + location.search);
  };

  /* --- theme --------------------------------------------------------------------------------- */

  const theme = document.getElementById("theme");
  const dark = matchMedia("(prefers-color-scheme: dark)");
  const stored = () => {
    try {
      return localStorage.getItem("leakatlas-theme");
    } catch {
      return null; // storage is refused in some private windows; the choice then lasts a page
    }
  };
  const showTheme = (choice) => {
    if (choice) document.documentElement.dataset.theme = choice;
    const isDark = choice ? choice === "dark" : dark.matches;
    theme.textContent = isDark ? "Light" : "Dark";
    theme.setAttribute("aria-label", `Switch to ${isDark ? "light" : "dark"} colours`);
    return isDark;
  };
  showTheme(stored());
  theme.hidden = false;
  theme.addEventListener("click", () => {
    const next = showTheme(document.documentElement.dataset.theme) ? "light" : "dark";
    try {
      localStorage.setItem("leakatlas-theme", next);
    } catch {
      // see stored()
    }
    showTheme(next);
  });

  /* --- tables -------------------------------------------------------------------------------- */

  const setUpTable = (form) => {
    const table = document.getElementById(form.dataset.for);
    const body = table.tBodies[0];
    const rows = [...body.rows];
    const search = form.querySelector("[data-search]");
    const filters = [...form.querySelectorAll("[data-filter]")];
    const mode = form.querySelector("[data-mode]");
    const found = document.querySelector(`[data-found-for="${table.id}"]`);
    const none = document.querySelector(".none");
    const headers = [...table.tHead.rows[0].cells];
    const texts = new Map(
      rows.map((row) => [row, `${row.textContent} ${row.dataset.text ?? ""}`.toLowerCase()]),
    );

    const value = (row, name) => {
      const printed = mode?.value === "printed" ? row.dataset[`${name}Printed`] : undefined;
      return (printed ?? row.dataset[name] ?? "").split(" ");
    };

    const apply = () => {
      const words = search.value.toLowerCase().split(/\s+/).filter(Boolean);
      let count = 0;
      for (const row of rows) {
        const fits =
          (mode?.value !== "printed" || row.dataset.origin === "published") &&
          words.every((word) => texts.get(row).includes(word)) &&
          filters.every((f) => !f.value || value(row, f.dataset.filter).includes(f.value));
        row.hidden = !fits;
        count += fits;
      }
      table.classList.toggle("show-printed", mode?.value === "printed");
      const noun = table.dataset.noun;
      found.textContent =
        count === rows.length ? `${count} ${noun}` : `${count} of ${rows.length} ${noun}`;
      none.hidden = count > 0;
    };

    const sortBy = (index, direction) => {
      const header = headers[index];
      const numeric = header.querySelector(".sort").dataset.type === "number";
      const key = (row) => row.cells[index].dataset.sort ?? row.cells[index].textContent.trim();
      const order = (a, b) =>
        numeric ? parseFloat(key(a)) - parseFloat(key(b)) : key(a).localeCompare(key(b), "en");
      const sorted = [...rows].sort((a, b) => (direction === "descending" ? order(b, a) : order(a, b)));
      body.append(...sorted);
      for (const other of headers) {
        if (other.hasAttribute("aria-sort")) other.setAttribute("aria-sort", "none");
      }
      header.setAttribute("aria-sort", direction);
    };

    const save = () => {
      const values = new URLSearchParams();
      if (search.value) values.set("q", search.value);
      for (const f of filters) if (f.value) values.set(f.dataset.filter, f.value);
      if (mode?.value === "printed") values.set("values", "printed");
      const sorted = headers.findIndex((h) =>
        ["ascending", "descending"].includes(h.getAttribute("aria-sort")),
      );
      if (sorted >= 0) {
        const sign = headers[sorted].getAttribute("aria-sort") === "descending" ? "-" : "";
        values.set("sort", `${sign}${sorted}`);
      }
      writeHash(values);
    };

    const restore = () => {
      const values = readHash();
      search.value = values.get("q") ?? "";
      for (const f of filters) {
        f.value = values.get(f.dataset.filter) ?? "";
        if (f.selectedIndex < 0) f.value = ""; // a value that no row has
      }
      if (mode) mode.value = values.get("values") === "printed" ? "printed" : "corrected";
      const sort = values.get("sort");
      const index = sort === null ? NaN : Number(sort.replace("-", ""));
      if (headers[index]?.hasAttribute("aria-sort")) {
        sortBy(index, sort.startsWith("-") ? "descending" : "ascending");
      }
      apply();
    };

    const clear = () => {
      search.value = "";
      for (const f of filters) f.value = "";
      apply();
      save();
      search.focus();
    };

    form.hidden = false;
    form.addEventListener("submit", (event) => event.preventDefault());
    form.addEventListener("input", () => {
      apply();
      save();
    });
    form.addEventListener("reset", (event) => {
      event.preventDefault();
      clear();
    });
    none.querySelector(".clear").addEventListener("click", clear);
    headers.forEach((header, index) => {
      header.querySelector(".sort")?.addEventListener("click", () => {
        const ascending = header.getAttribute("aria-sort") === "ascending";
        sortBy(index, ascending ? "descending" : "ascending");
        save();
        announce(`Sorted by ${header.textContent.trim()}, ${header.getAttribute("aria-sort")}`);
      });
    });
    addEventListener("hashchange", () => {
      if (location.hash.includes("=")) restore();
    });
    restore();
  };

  document.querySelectorAll("form.filters").forEach(setUpTable);

  /* --- the seven switches -------------------------------------------------------------------- */

  const setUpSwitches = (form) => {
    const data = JSON.parse(document.getElementById("data").textContent);
    const boxes = [...form.querySelectorAll("input[name=knows]")];
    const presets = [...form.querySelectorAll(".preset")];
    const source = document.getElementById("source");
    const verdict = document.getElementById("verdict");
    const rank = { holds: 0, partial: 1, fails: 2 };

    const held = () => new Set(boxes.filter((box) => box.checked).map((box) => box.value));
    const within = (needed, have) => needed.every((name) => have.has(name));

    /* The worst stance over the letters this adversary can act as; null where one is unknown
       and none of the known ones fails. */
    const worst = (stances, letters) => {
      const known = letters.map((letter) => stances[letter]).filter(Boolean);
      const top = known.sort((a, b) => rank[b] - rank[a])[0];
      return known.length === letters.length || top === "fails" ? top : null;
    };

    const update = () => {
      const have = held();
      const letters = Object.keys(data.threats).filter((x) => within(data.threats[x], have));
      const exact = letters.find((x) => data.threats[x].length === have.size);
      let reachable = 0;
      for (const item of document.querySelectorAll("[data-attack]")) {
        const on = letters.includes(data.attacks[item.dataset.attack].corrected);
        item.classList.toggle("on", on);
        item.querySelector(".status").textContent = on ? "within reach" : "out of reach";
        reachable += on;
      }
      let holding = 0;
      for (const item of document.querySelectorAll("[data-defense]")) {
        const stances = data.defenses[item.dataset.defense][source.value];
        const stance = letters.length ? worst(stances, letters) : "holds";
        item.classList.remove("holds", "partial", "fails");
        if (stance) item.classList.add(stance);
        item.querySelector(".status").textContent = stance ?? `not ${source.value}`;
        holding += stance === "holds";
      }
      const attacks = document.querySelectorAll("[data-attack]").length;
      const defenses = document.querySelectorAll("[data-defense]").length;
      document.getElementById("attack-count").textContent = `${reachable} of ${attacks}`;
      document.getElementById("defense-count").textContent = `${holding} of ${defenses}`;
      const who = exact
        ? `This is ${exact}, the ${data.names[exact]}.`
        : letters.length
          ? `No letter of its own; it can act as ${letters.join(", ")}.`
          : "Without updates there is nothing to invert.";
      verdict.textContent = `${who} ${reachable} attacks within reach, ${holding} defenses hold.`;
      for (const preset of presets) {
        preset.setAttribute("aria-pressed", String(preset.dataset.letter === exact));
      }
    };

    const save = () => {
      const values = new URLSearchParams();
      values.set("knows", [...held()].join(","));
      if (source.value !== "printed") values.set("colours", source.value);
      writeHash(values);
    };

    const restore = () => {
      const values = readHash();
      if (values.has("knows")) {
        const have = new Set(values.get("knows").split(","));
        for (const box of boxes) box.checked = have.has(box.value);
      }
      source.value = values.get("colours") === "measured" ? "measured" : "printed";
      update();
    };

    form.addEventListener("submit", (event) => event.preventDefault());
    form.addEventListener("change", () => {
      update();
      save();
    });
    source.addEventListener("change", () => {
      update();
      save();
    });
    for (const preset of presets) {
      preset.addEventListener("click", () => {
        const have = new Set(data.threats[preset.dataset.letter]);
        for (const box of boxes) box.checked = have.has(box.value);
        update();
        save();
      });
    }
    addEventListener("hashchange", restore);
    restore();
  };

  const switches = document.getElementById("switches");
  if (switches) setUpSwitches(switches);

  /* --- copying ------------------------------------------------------------------------------- */

  const copyText = async (text) => {
    if (navigator.clipboard && window.isSecureContext) {
      try {
        await navigator.clipboard.writeText(text);
        return true;
      } catch {
        // refused by permission: the older way below still works on a click
      }
    }
    const area = document.createElement("textarea");
    area.value = text;
    area.className = "visually-hidden";
    document.body.append(area);
    area.select();
    const done = document.execCommand("copy");
    area.remove();
    return done;
  };

  for (const button of document.querySelectorAll(".copy")) {
    button.addEventListener("click", async () => {
      const label = button.textContent;
      const done = await copyText(document.getElementById(button.dataset.copy).textContent);
      button.textContent = done ? "Copied" : "Press Ctrl+C";
      announce(done ? "BibTeX copied" : "Copying was refused");
      button.focus();
      setTimeout(() => {
        button.textContent = label;
      }, 1500);
    });
  }
})();
