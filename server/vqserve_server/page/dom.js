// The page is changed in place, so that focus, selection and a reader's position survive. What is written is always text.

const SVG = "http://www.w3.org/2000/svg";

function made(node, attributes, children) {
  for (const [name, value] of Object.entries(attributes)) node.setAttribute(name, value);
  node.append(...children);
  return node;
}

/** Make an element; children are nodes and texts. */
export const element = (tag, attributes = {}, ...children) => made(document.createElement(tag), attributes, children);

/** Make an element of a picture. */
export const svg = (tag, attributes = {}, ...children) => made(document.createElementNS(SVG, tag), attributes, children);

/** Set an element's text, if it is another. */
export function say(node, text) {
  if (node.textContent !== text) node.textContent = text;
}

/** Set an attribute, if it is another; null removes it. */
export function set(node, name, value) {
  if (value === null) node.removeAttribute(name);
  else if (node.getAttribute(name) !== String(value)) node.setAttribute(name, value);
}

/** The children of a node, one for each key. */
export class Keyed {
  /**
   * @param {Element} parent
   * @param {function(string): {node: Element, update: function}} make
   */
  constructor(parent, make) {
    this.parent = parent;
    this.make = make;
    this.made = new Map();
  }

  /** Make, order and remove children so that there is one for each key, and give each its value. */
  update(entries) {
    const keys = new Set(entries.map(([key]) => key));
    for (const [key, child] of this.made) {
      if (keys.has(key)) continue;
      child.node.remove();
      this.made.delete(key);
    }
    let place = this.parent.firstElementChild;
    for (const [key, value] of entries) {
      if (!this.made.has(key)) this.made.set(key, this.make(key));
      const child = this.made.get(key);
      if (child.node === place) place = place.nextElementSibling;
      else this.parent.insertBefore(child.node, place);
      child.update(value);
    }
  }
}

/** Make a row of a table: the first `heads` cells head it, those of `numbers` are aligned to the right. */
export function row(cells, { heads = 1, numbers = [] } = {}) {
  const nodes = Array.from({ length: cells }, (_, i) => {
    const cell = i < heads ? element("th", { scope: "row" }) : element("td");
    if (numbers.includes(i)) cell.className = "n";
    return cell;
  });
  return { node: element("tr", {}, ...nodes), cells: nodes };
}
