import assert from "node:assert/strict";
import { test } from "node:test";
import { create, toBinary } from "@bufbuild/protobuf";
import { durationFromMs } from "@bufbuild/protobuf/wkt";
import { Code, ConnectError } from "@connectrpc/connect";
import { BadRequestSchema, ErrorInfoSchema, RetryInfoSchema } from "../dist/gen/google/rpc/error_details_pb.js";
import { readError } from "../dist/index.js";

/** An error as received from the wire: details are bytes with a type name. */
function received(message, code, ...details) {
  const error = new ConnectError(message, code);
  error.details = details.map(([schema, init]) => ({
    type: schema.typeName,
    value: toBinary(schema, create(schema, init)),
  }));
  return error;
}

test("reads the code, the incident, the delay and the fields", () => {
  const error = received(
    "too many calls",
    Code.ResourceExhausted,
    [ErrorInfoSchema, { reason: "PROXY", domain: "example.com", metadata: { error_code: "not ours" } }],
    [ErrorInfoSchema, { reason: "RATE", domain: "hapa", metadata: { error_code: "E4004", incident_id: "INC-20260102-00C0FFEE" } }],
    [RetryInfoSchema, { retryDelay: durationFromMs(1500) }],
    [BadRequestSchema, { fieldViolations: [{ field: "user_question", description: "is empty", reason: "EMPTY" }] }],
  );
  assert.deepEqual(readError(error), {
    message: "too many calls",
    code: "E4004",
    incidentId: "INC-20260102-00C0FFEE",
    retryAfterMs: 1500,
    fields: [{ field: "user_question", description: "is empty" }],
  });
});

test("leaves absent what the error does not contain", () => {
  assert.deepEqual(readError(new TypeError("Failed to fetch")), {
    message: "Failed to fetch",
    code: undefined,
    incidentId: undefined,
    retryAfterMs: undefined,
    fields: [],
  });
});
