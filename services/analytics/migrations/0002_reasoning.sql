-- Reasoning of models: its tokens, and the time to the first token of the answer after it.
-- Microseconds. NULL: not measured; without reasoning tokens, time_to_first_token_us counts in its place.
ALTER TABLE usage_events ADD COLUMN time_to_first_answer_token_us BIGINT;
-- Part of completion_tokens.
ALTER TABLE usage_events ADD COLUMN reasoning_tokens BIGINT NOT NULL DEFAULT 0;

ALTER TABLE performance_rollups ADD COLUMN reasoning_tokens BIGINT NOT NULL DEFAULT 0;
-- The times to the first answer token. '': equal to the times to the first token in sketches.
-- A column of its own, because the previous version still reads and writes sketches.
ALTER TABLE performance_rollups ADD COLUMN answer_sketch TEXT NOT NULL DEFAULT '';

ALTER TABLE usage_days ADD COLUMN reasoning_tokens BIGINT NOT NULL DEFAULT 0;
