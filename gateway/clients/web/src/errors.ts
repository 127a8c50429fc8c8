import { durationMs } from "@bufbuild/protobuf/wkt";
import { ConnectError } from "@connectrpc/connect";
import { BadRequestSchema, ErrorInfoSchema, RetryInfoSchema } from "./gen/google/rpc/error_details_pb.js";

/** A request field that HAPA rejected. */
export interface FieldError {
  /** Path of the field, such as `user_profile.python_skill_level`. */
  readonly field: string;
  /** What is wrong with it. */
  readonly description: string;
}

/** A failed call: code, incident, retry delay and fields. */
export interface HapaError {
  /** What happened, in English. */
  readonly message: string;
  /**
   * A published error code, such as `E4003`. Absent if the error does not come from HAPA: the
   * network failed, the gateway refused the page's origin, or the page cancelled the call.
   */
  readonly code: string | undefined;
  /** Identifies this failure to the operators of HAPA: `INC-YYYYMMDD-XXXXXXXX`. */
  readonly incidentId: string | undefined;
  /** Delay before a retry, in milliseconds; absent if HAPA gave none. */
  readonly retryAfterMs: number | undefined;
  /** The fields to correct; empty if no field of the request caused the error. */
  readonly fields: readonly FieldError[];
}

/** Reads the error that a call threw. Accepts any value, so that a `catch` can pass its error as it is. */
export function readError(error: unknown): HapaError {
  const failure = ConnectError.from(error);
  // A proxy may add details of its own; codes and incident ids are in those of the domain `hapa`.
  const info = failure.findDetails(ErrorInfoSchema).find(({ domain }) => domain === "hapa");
  const delay = failure.findDetails(RetryInfoSchema)[0]?.retryDelay;
  return {
    message: failure.rawMessage,
    code: info?.metadata["error_code"],
    incidentId: info?.metadata["incident_id"],
    retryAfterMs: delay && durationMs(delay),
    fields: failure
      .findDetails(BadRequestSchema)
      .flatMap(({ fieldViolations }) => fieldViolations)
      .map(({ field, description }) => ({ field, description })),
  };
}
