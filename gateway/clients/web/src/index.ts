/**
 * HAPA in the browser: typed clients over gRPC-Web, and errors as structured data.
 *
 * ```ts
 * const { codegen } = createHapaClient({ baseUrl: "http://127.0.0.1:8000", apiKey });
 * const stop = new AbortController(); // stop.abort() also cancels the generation at the engine
 * try {
 *   const question = { userQuestion: "Reverse a linked list", language: "python" };
 *   for await (const { event } of codegen.streamGenerateCode(question, { signal: stop.signal })) {
 *     if (event.case === "delta") show(event.value.text, event.value.kind);
 *   }
 * } catch (error) {
 *   const { code, incidentId, retryAfterMs } = readError(error);
 * }
 * ```
 *
 * @packageDocumentation
 */
import { createClient, type Client, type Interceptor } from "@connectrpc/connect";
import { createGrpcWebTransport } from "@connectrpc/connect-web";
import { AnalyticsService } from "./gen/hapa/analytics/v1/analytics_pb.js";
import { AuditService } from "./gen/hapa/auth/v1/audit_pb.js";
import { KeyService } from "./gen/hapa/auth/v1/key_pb.js";
import { SessionService } from "./gen/hapa/auth/v1/session_pb.js";
import { UserService } from "./gen/hapa/auth/v1/user_pb.js";
import { CodegenService } from "./gen/hapa/codegen/v1/codegen_pb.js";
import { ErrorTrackingService } from "./gen/hapa/errors/v1/errors_pb.js";
import { SystemService } from "./gen/hapa/system/v1/system_pb.js";

export { readError, type FieldError, type HapaError } from "./errors.js";
export * from "./gen/hapa/analytics/v1/analytics_pb.js";
export * from "./gen/hapa/auth/v1/audit_pb.js";
export * from "./gen/hapa/auth/v1/key_pb.js";
export * from "./gen/hapa/auth/v1/session_pb.js";
export * from "./gen/hapa/auth/v1/user_pb.js";
export * from "./gen/hapa/codegen/v1/codegen_pb.js";
export * from "./gen/hapa/codegen/v1/completion_pb.js";
export * from "./gen/hapa/codegen/v1/usage_pb.js";
export * from "./gen/hapa/errors/v1/errors_pb.js";
export * from "./gen/hapa/system/v1/system_pb.js";

/** The address of HAPA and the credential to call it with. */
export interface HapaOptions {
  /** The gateway's address, such as `https://hapa.example.com`. */
  readonly baseUrl: string;
  /**
   * The API key sent with every call. Every user of the page can read it: use a key with few
   * scopes and a short lifetime.
   */
  readonly apiKey?: string;
  /**
   * Returns the access token of a session. The client calls it before each request, so that it
   * can return a refreshed token. Used if no key is set. `sessions.createSession` and
   * `sessions.refreshSession` need neither.
   */
  readonly accessToken?: () => string | undefined;
}

/** One typed client for each service that the gateway routes. */
export interface HapaClient {
  /** Generates code and completes it at a cursor, as one response or as a stream of tokens. */
  readonly codegen: Client<typeof CodegenService>;
  /** Manages API keys: the user's own with a session, all with the scope `auth:admin`. */
  readonly keys: Client<typeof KeyService>;
  /** Manages users and profiles: the calling user, or all with the scope `auth:admin`. */
  readonly users: Client<typeof UserService>;
  /** Logs in and out. */
  readonly sessions: Client<typeof SessionService>;
  /** Reads the audit log; needs the scope `auth:admin`. */
  readonly audit: Client<typeof AuditService>;
  /** Searches failures: those of the caller with `errors:read`, all with `errors:admin`. */
  readonly errors: Client<typeof ErrorTrackingService>;
  /** Reports usage and performance; needs `analytics:read`. */
  readonly analytics: Client<typeof AnalyticsService>;
  /** Reports the state of the mesh; health needs no credential. */
  readonly system: Client<typeof SystemService>;
}

/** Creates the clients. Nothing is sent before the first call. */
export function createHapaClient({ baseUrl, apiKey, accessToken }: HapaOptions): HapaClient {
  const present: Interceptor = (next) => (request) => {
    const token = apiKey === undefined ? accessToken?.() : undefined;
    if (apiKey !== undefined) request.header.set("x-api-key", apiKey);
    if (token !== undefined) request.header.set("authorization", `Bearer ${token}`);
    return next(request);
  };
  const transport = createGrpcWebTransport({ baseUrl, interceptors: [present] });
  return {
    codegen: createClient(CodegenService, transport),
    keys: createClient(KeyService, transport),
    users: createClient(UserService, transport),
    sessions: createClient(SessionService, transport),
    audit: createClient(AuditService, transport),
    errors: createClient(ErrorTrackingService, transport),
    analytics: createClient(AnalyticsService, transport),
    system: createClient(SystemService, transport),
  };
}
