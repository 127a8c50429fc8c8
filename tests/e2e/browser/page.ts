/**
 * The smallest page that uses `@hapa/web` as a user would: it shows each piece of an answer as it
 * comes, code and explanation apart, and says how the answer ended. run.mjs plays its user.
 */
import { createHapaClient, readError, StreamGenerateCodeResponse_Kind as Kind } from "@hapa/web";

type Status = "streaming" | "finished" | "cancelled" | "failed";

const find = <T extends HTMLElement>(id: string) => document.getElementById(id) as T;
const input = (id: string) => find<HTMLInputElement>(id).value;
const show = (id: string, text: string | undefined) => (find(id).textContent = text ?? "");
const cancel = find<HTMLButtonElement>("cancel");

async function ask(signal: AbortSignal): Promise<Status> {
  const { codegen } = createHapaClient({ baseUrl: input("gateway"), apiKey: input("key") });
  const question = { userQuestion: input("question"), language: "python", noCache: true };
  let whole = false;
  try {
    // Read to the end also after `finished`: leaving earlier would cancel the call.
    for await (const { event } of codegen.streamGenerateCode(question, { signal })) {
      if (event.case === "delta") {
        find(event.value.kind === Kind.CODE ? "code" : "explanation").append(event.value.text);
      } else if (event.case === "finished") {
        show("finish-reason", event.value.finishReason);
        whole = true;
      }
    }
    if (whole) return "finished";
    show("message", "the stream ended without saying that it was whole");
  } catch (error) {
    if (signal.aborted) return "cancelled";
    const { message, code, incidentId } = readError(error);
    show("message", message);
    show("error-code", code);
    show("incident-id", incidentId);
  }
  return "failed";
}

find("ask").addEventListener("submit", async (submit) => {
  submit.preventDefault();
  const stop = new AbortController();
  for (const id of ["code", "explanation", "finish-reason", "message", "error-code", "incident-id"]) show(id, "");
  show("status", "streaming" satisfies Status);
  cancel.disabled = false;
  cancel.onclick = () => stop.abort();
  show("status", await ask(stop.signal));
  cancel.disabled = true;
});
