/**
 * Plays the page's user in a real Chromium. The test that starts it owns the gateway, the mesh and
 * the engine, and steers both ends: one JSON line on stdout for each event, one on stdin where a
 * scene waits. Exit code 0: every scene went as described; 1: the last line is a `failure`.
 */
import { once } from "node:events";
import { existsSync } from "node:fs";
import { readFile } from "node:fs/promises";
import { createServer } from "node:http";
import { createRequire } from "node:module";
import { createInterface } from "node:readline";
import { fileURLToPath } from "node:url";

const WAIT_MS = 30_000;
const FLAGS =
  "--disable-gpu --disable-quic --no-first-run --disable-background-networking --disable-component-update --disable-sync";

const path = (relative) => fileURLToPath(new URL(relative, import.meta.url));
const WEB = "../../../gateway/clients/web/";
// The client's package brings the tools, so that one `npm ci` serves both.
const tools = createRequire(path(`${WEB}package.json`));

const print = (event, fields = {}) => process.stdout.write(`${JSON.stringify({ event, ...fields })}\n`);

/** Rejects when `promise` takes longer than any step may. */
function bounded(promise, what) {
  let timer;
  const late = new Promise((_, reject) => {
    timer = setTimeout(() => reject(new Error(`waited ${WAIT_MS / 1000} s for ${what}`)), WAIT_MS);
  });
  return Promise.race([promise, late]).finally(() => clearTimeout(timer));
}

const lines = createInterface({ input: process.stdin })[Symbol.asyncIterator]();

async function waitForGo(word) {
  const { value, done } = await bounded(lines.next(), `{"go":"${word}"}`);
  if (done) throw new Error(`stdin ended before {"go":"${word}"}`);
  if (JSON.parse(value).go !== word) throw new Error(`expected {"go":"${word}"}, got ${value}`);
}

/** Bundles the page against the built package: what a user installs is what is tested. */
async function bundlePage() {
  const client = path(`${WEB}dist/index.js`);
  if (!existsSync(client)) throw new Error("gateway/clients/web is not built: run `npm ci && npm run build` there");
  const { outputFiles } = await tools("esbuild").build({
    entryPoints: [path("page.ts")],
    alias: { "@hapa/web": client },
    bundle: true,
    format: "esm",
    logLevel: "silent",
    write: false,
  });
  return outputFiles[0].text;
}

async function servePage(port, html, script) {
  const server = createServer((request, response) => {
    const [type, body] = request.url === "/page.js" ? ["text/javascript", script] : ["text/html", html];
    response.writeHead(200, { "content-type": `${type}; charset=utf-8` }).end(body);
  });
  await once(server.listen(Number(port), "127.0.0.1"), "listening");
  return server;
}

/** One opened page, and the hands and eyes of its user. */
class User {
  constructor(page) {
    this.page = page;
    page.setDefaultTimeout(WAIT_MS);
  }

  read(id) {
    return this.page.locator(`#${id}`).textContent();
  }

  async ask({ key = process.env.HAPA_KEY } = {}) {
    await this.page.fill("#gateway", process.env.HAPA_GATEWAY);
    await this.page.fill("#key", key);
    await this.page.fill("#question", "Reverse a list");
    await this.page.click("#send");
  }

  /** Waits until `look`, run in the page, gives something, and returns that. */
  async see(what, look) {
    const seen = await bounded(this.page.waitForFunction(look, null, { timeout: 0 }), what);
    return seen.jsonValue();
  }

  /** Waits until the page says how the stream ended, and insists that it ended so. */
  async seeEnd(expected) {
    await this.see(`"${expected}" on the page`, () => document.getElementById("status").textContent !== "streaming");
    const [status, message] = [await this.read("status"), await this.read("message")];
    if (status !== expected) throw new Error(`the page shows "${status}", not "${expected}": ${message}`);
    return message;
  }

  /** Waits for the first text in the document while the stream is open, and returns that text. */
  async seeFirstToken() {
    const { text, status, message } = await this.see("the first token on the page", () => {
      const shown = (id) => document.getElementById(id).textContent;
      const text = shown("explanation") + shown("code");
      return (text || shown("status") !== "streaming") && { text, status: shown("status"), message: shown("message") };
    });
    if (status !== "streaming") throw new Error(`the stream is no longer open: ${status}, ${message}`);
    return text;
  }
}

async function rendersTokensAsTheyCome(user) {
  await user.ask();
  print("first-token-rendered", { text: await user.seeFirstToken() });
  await waitForGo("finish");
  await user.seeEnd("finished");
  const [code, explanation] = [await user.read("code"), await user.read("explanation")];
  print("finished", { code, explanation, finish_reason: await user.read("finish-reason") });
}

async function cancels(user) {
  await user.ask();
  await user.seeFirstToken();
  await user.page.click("#cancel");
  await user.seeEnd("cancelled");
  print("cancelled");
  await waitForGo("next");
}

async function isRefusedFromAnotherOrigin(user) {
  // A page is not told why; without the console's word a gateway that is down would pass too.
  const predicate = (line) => line.text().includes("blocked by CORS policy");
  const refusal = user.page.waitForEvent("console", { predicate }).catch(() => undefined);
  await user.ask();
  const message = await user.seeEnd("failed");
  if (!(await refusal)) throw new Error(`the stream failed, but not for the page's origin: ${message}`);
  print("refused", { message });
}

async function readsTheErrorOfAWrongKey(user) {
  await user.ask({ key: "hapa_wrong" });
  await user.seeEnd("failed");
  print("error", { code: await user.read("error-code"), incident_id: await user.read("incident-id") });
}

async function main(cleanups) {
  const html = await readFile(path("page.html"));
  const script = await bundlePage();
  const { HAPA_PAGE_PORT_ALLOWED: allowed, HAPA_PAGE_PORT_OTHER: other } = process.env;
  for (const port of [allowed, other]) {
    const server = await servePage(port, html, script);
    cleanups.push(() => server.close());
  }
  const browser = await tools("playwright-core").chromium.launch({
    executablePath: process.env.CHROMIUM ?? "/usr/bin/chromium",
    headless: true,
    chromiumSandbox: false, // --no-sandbox: containers and CI run as root
    args: FLAGS.split(" "),
    timeout: WAIT_MS,
  });
  cleanups.push(() => browser.close());

  const open = async (port) => {
    const user = new User(await browser.newPage());
    await user.page.goto(`http://127.0.0.1:${port}/`);
    return user;
  };
  const user = await open(allowed);
  await rendersTokensAsTheyCome(user);
  await cancels(user);
  await isRefusedFromAnotherOrigin(await open(other));
  await readsTheErrorOfAWrongKey(user);
}

const cleanups = [];
try {
  await main(cleanups);
} catch (error) {
  print("failure", { message: error.message });
  process.exitCode = 1;
} finally {
  for (const cleanup of cleanups.reverse()) await cleanup();
  process.stdin.destroy(); // an open stdin would keep the process alive
}
