// Shows openapi.json: one section a route, one table a request body.

function make(tag, properties = {}, ...children) {
  const element = Object.assign(document.createElement(tag), properties);
  element.append(...children);
  return element;
}

function typeOf(schema) {
  if (schema.anyOf) return schema.anyOf.map(typeOf).join(" or ");
  if (schema.const !== undefined) return JSON.stringify(schema.const);
  if (schema.enum) return schema.enum.map((value) => JSON.stringify(value)).join(", ");
  if (schema.type === "array") return `list of ${typeOf(schema.items ?? {})}`;
  const range = [
    schema.minimum === undefined ? "" : `from ${schema.minimum}`,
    schema.maximum === undefined ? "" : `to ${schema.maximum}`,
    schema.format ?? "",
  ].filter(Boolean).join(" ");
  return `${schema.type ?? "anything"}${range ? ` (${range})` : ""}`;
}

function fieldsTable(kind, schema) {
  const required = new Set(schema.required ?? []);
  const rows = Object.entries(schema.properties ?? {}).map(([name, field]) => {
    const byDefault = required.has(name) ? "required" : field.default === undefined || field.default === null ? "" : JSON.stringify(field.default);
    return make("tr", {},
      make("th", { scope: "row" }, make("code", { textContent: name })),
      make("td", { textContent: typeOf(field) }),
      make("td", { textContent: byDefault }),
      make("td", { textContent: field.description ?? "" }));
  });
  const head = make("tr", {}, ...["field", "type", "default", "meaning"].map((name) => make("th", { scope: "col", textContent: name })));
  return make("div", { className: "scrolling", tabIndex: 0 },
    make("table", {}, make("caption", { className: "muted", textContent: kind }), make("thead", {}, head), make("tbody", {}, ...rows)));
}

const api = await (await fetch("openapi.json")).json();
const sections = Object.entries(api.paths).flatMap(([path, methods]) =>
  Object.entries(methods).map(([method, operation]) => make("section", {},
    make("h2", {}, make("code", { textContent: `${method.toUpperCase()} ${path}` })),
    make("p", { className: "muted", textContent: operation.summary ?? "" }),
    ...Object.entries(operation.requestBody?.content ?? {}).map(([kind, { schema }]) => fieldsTable(kind, schema)))));
document.getElementById("paths").replaceChildren(...sections);
