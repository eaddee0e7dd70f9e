// Requests to the server that gave this page: the token, errors in its words, streams of events.

/** `token` of the server, and what to do when it refuses it. */
export const access = { token: "", refused: () => {} };

/** A response, or an Error with the server's own words. */
export async function call(path, options = {}) {
  const headers = { ...options.headers };
  if (access.token) headers.Authorization = `Bearer ${access.token}`;
  let response;
  try {
    response = await fetch(path, { ...options, headers });
  } catch (error) {
    if (error.name === "AbortError") throw error;
    throw new Error("The server does not answer. Is medmo-edge serve still running?");
  }
  if (response.status === 401) {
    access.refused();
    throw new Error("The server needs its token.");
  }
  if (!response.ok) {
    const body = await response.json().catch(() => null);
    throw new Error(sentence(body?.error?.message ?? `The server answered ${response.status}.`));
  }
  return response;
}

export const sentence = (text) => text.charAt(0).toUpperCase() + text.slice(1) + (/[.!?]$/.test(text) ? "" : ".");

/** Events of a stream as objects. */
export async function* events(response) {
  const reader = response.body.pipeThrough(new TextDecoderStream()).getReader();
  let rest = "";
  for (;;) {
    const { value, done } = await reader.read();
    if (done) return;
    const blocks = (rest + value).split("\n\n");
    rest = blocks.pop();
    for (const block of blocks) if (block.startsWith("data: ")) yield JSON.parse(block.slice(6));
  }
}
