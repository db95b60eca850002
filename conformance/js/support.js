// What the tests of this folder share: sandboxes that are killed when a file's tests end, the
// address of the daemon, and waiting for a condition.
import assert from 'node:assert/strict'
import { randomUUID } from 'node:crypto'
import { readFileSync } from 'node:fs'
import { after } from 'node:test'
import { Sandbox } from 'e2b'

// What `nidus env` prints.
const allowed = ['E2B_API_URL', 'E2B_SANDBOX_URL', 'E2B_API_KEY', 'E2B_VOLUME_API_URL']
for (const name of allowed) assert.ok(process.env[name], `${name} is not set: run conformance/run.sh, or eval $(nidus env)`)
for (const name of Object.keys(process.env))
  assert.ok(!name.startsWith('E2B_') || allowed.includes(name), `only what nidus env prints may be set, not ${name}`)

export const sandboxUrl = process.env.E2B_SANDBOX_URL
export const apiUrl = process.env.E2B_API_URL

/** Long enough for any file of tests under emulation; a lost sandbox ends by itself. */
const SANDBOX_MS = 600_000

const made = []
after(async () => {
  await Promise.all(made.map((sandbox) => sandbox.kill()))
})

/** A sandbox that is killed when the file's tests end. */
export async function newSandbox(options = {}) {
  const sandbox = await Sandbox.create({ timeoutMs: SANDBOX_MS, ...options })
  made.push(sandbox)
  return sandbox
}

/** A path in the sandbox that no other test uses. */
export const freshFolder = () => `/home/user/t-${randomUUID().slice(0, 8)}`

/** The text of a file of ../support, which runs inside sandboxes. */
export const guestFile = (name) => readFileSync(new URL(`../support/${name}`, import.meta.url), 'utf8')

/** Asks `condition` until it answers something true. */
export async function waitFor(what, condition, seconds) {
  const deadline = Date.now() + seconds * 1000
  for (;;) {
    const answer = await condition()
    if (answer) return answer
    assert.ok(Date.now() < deadline, `waited ${seconds} s for ${what}`)
    await new Promise((resolve) => setTimeout(resolve, 50))
  }
}

/** The error that the promise was rejected with; it must be of the class. */
export async function rejection(promise, kind) {
  try {
    await promise
  } catch (error) {
    assert.ok(error instanceof kind, `expected ${kind.name}, got ${error?.name}: ${error?.message}`)
    return error
  }
  assert.fail(`expected ${kind.name}, but it succeeded`)
}

/** One raw REST call with the key of the environment. */
export async function rest(method, path, body, headers = { 'X-API-Key': process.env.E2B_API_KEY }) {
  const answer = await fetch(apiUrl + path, {
    method,
    headers: body === undefined ? headers : { ...headers, 'Content-Type': 'application/json' },
    body: body === undefined ? undefined : JSON.stringify(body),
  })
  const text = await answer.text()
  return { status: answer.status, body: text ? JSON.parse(text) : undefined }
}
