import assert from "node:assert/strict";
import { test } from "node:test";
import { create, fromJson, toJson } from "@bufbuild/protobuf";
import { CodegenService, CompleteCodeRequestSchema, CompleteCodeResponseSchema } from "../dist/index.js";

test("completion is a call and a stream of the same request", () => {
  const { completeCode, streamCompleteCode } = CodegenService.method;
  assert.equal(completeCode.methodKind, "unary");
  assert.equal(streamCompleteCode.methodKind, "server_streaming");
  assert.equal(completeCode.input, streamCompleteCode.input);
});

test("a request and a reply have the documented names in JSON", () => {
  const request = create(CompleteCodeRequestSchema, { prefix: "print(", maxSuggestions: 3, completionType: "inline" });
  assert.deepEqual(toJson(CompleteCodeRequestSchema, request, { useProtoFieldName: true }), {
    prefix: "print(",
    max_suggestions: 3,
    completion_type: "inline",
  });
  const reply = fromJson(CompleteCodeResponseSchema, {
    suggestions: [{ text: "x", confidence: 0.5, completion_type: "inline" }],
    response_time_ms: 12,
    cached: false,
  });
  assert.equal(reply.suggestions[0].confidence, 0.5);
  assert.equal(reply.responseTimeMs, 12);
});
