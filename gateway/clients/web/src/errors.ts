import { durationMs } from "@bufbuild/protobuf/wkt";
import { ConnectError } from "@connectrpc/connect";
import { BadRequestSchema, ErrorInfoSchema, RetryInfoSchema } from "./gen/google/rpc/error_details_pb.js";

/** One field of a request that HAPA did not accept. */
export interface FieldError {
  /** Path of the field, such as `user_profile.python_skill_level`. */
  readonly field: string;
  /** What is wrong with it. */
  readonly description: string;
}

/** What a failed call says about itself. */
export interface HapaError {
  /** What happened, in words. */
  readonly message: string;
  /**
   * One of the published codes, such as `E4003`. Absent when HAPA itself did not answer: no
   * network, a gateway that refused the page's origin, or a call that was cancelled here.
   */
  readonly code: string | undefined;
  /** Names this failure to whoever runs HAPA: `INC-YYYYMMDD-XXXXXXXX`. */
  readonly incidentId: string | undefined;
  /** How long to wait before the same call makes sense again; absent: not said. */
  readonly retryAfterMs: number | undefined;
  /** The fields to correct; empty when the request's fields are not the reason. */
  readonly fields: readonly FieldError[];
}

/** Reads what a call threw. Takes anything, so that a `catch` can pass on what it got. */
export function readError(error: unknown): HapaError {
  const failure = ConnectError.from(error);
  // A proxy in between may add details of its own: only HAPA's carry codes and incidents.
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
