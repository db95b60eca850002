// Pseudo-terminals through the official JavaScript SDK.
import assert from 'node:assert/strict'
import { before, test } from 'node:test'
import { CommandExitError } from 'e2b'
import { newSandbox, rejection, waitFor } from './support.js'

let sbx
before(async () => {
  sbx = await newSandbox()
})

const bytes = (text) => new TextEncoder().encode(text)

/** A terminal and everything it has shown. */
async function terminal(options = {}) {
  const screen = { text: '' }
  const decoder = new TextDecoder()
  screen.onData = (data) => {
    screen.text += decoder.decode(data, { stream: true })
  }
  const handle = await sbx.pty.create({ cols: 80, rows: 24, onData: screen.onData, ...options })
  return { handle, screen }
}

test('size, user, envs, cwd and resize', async () => {
  const { handle, screen } = await terminal({ envs: { COLOUR: 'blue' }, cwd: '/tmp' })
  await sbx.pty.sendInput(handle.pid, bytes("tty; stty size; id -un; echo $TERM-$COLOUR; pwd; echo en''d\n"))
  await waitFor('the first answers', () => screen.text.includes('end\r\n'), 30)
  for (const part of ['/dev/pts/', '24 80', 'user', 'xterm-256color-blue', '/tmp']) assert.ok(screen.text.includes(part), screen.text)
  await sbx.pty.resize(handle.pid, { cols: 132, rows: 40 })
  await sbx.pty.sendInput(handle.pid, bytes('stty size\n'))
  await waitFor('the new size', () => screen.text.includes('40 132'), 30)
  assert.equal(await handle.kill(), true)
  await rejection(handle.wait(), CommandExitError)
})

test('exit code, and a terminal that is gone', async () => {
  const { handle } = await terminal()
  await sbx.pty.sendInput(handle.pid, bytes('exit 5\n'))
  assert.equal((await rejection(handle.wait(), CommandExitError)).exitCode, 5)
  assert.equal(await sbx.pty.kill(handle.pid), false)
})

test('connect to a running terminal', async () => {
  const { handle } = await terminal()
  await handle.disconnect()
  let text = ''
  const again = await sbx.pty.connect(handle.pid, { onData: (data) => void (text += Buffer.from(data).toString()) })
  await sbx.pty.sendInput(again.pid, bytes("echo ba''ck\n"))
  await waitFor('the answer', () => text.includes('back\r\n'), 30)
  assert.equal(await sbx.pty.kill(again.pid), true)
})
