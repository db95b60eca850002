// @e2b/code-interpreter, unmodified, on the template of templates/code-interpreter. What is told apart there by the server is
// tried in ../python/test_code_interpreter.py.
import assert from 'node:assert/strict'
import { execFileSync } from 'node:child_process'
import { after, before, test } from 'node:test'
import { Sandbox } from '@e2b/code-interpreter'

const timeout = 180_000
let sandbox

before(async () => {
  execFileSync('python3', ['-m', 'support.interpreter'], { cwd: new URL('..', import.meta.url), stdio: 'inherit' })
  sandbox = await Sandbox.create({ timeoutMs: 600_000 })
}, { timeout: 600_000 })
after(async () => { if (sandbox) await sandbox.kill() })

test('state stays, output is streamed, and the last value is the result', { timeout }, async () => {
  await sandbox.runCode('x = 20')
  const lines = []
  const done = await sandbox.runCode('print("out"); x += 1; x', { onStdout: (m) => lines.push(m.line) })
  assert.equal(done.text, '21')
  assert.deepEqual([lines.join(''), done.logs.stdout.join(''), done.error], ['out\n', 'out\n', undefined])
})

test('a plot is a picture and its data', { timeout }, async () => {
  const done = await sandbox.runCode(`
    import matplotlib.pyplot as plt
    plt.bar(["A", "B"], [1, 2], label="n"); plt.title("T"); plt.ylabel("Weight (kg)"); plt.show()
  `)
  const [result] = done.results
  assert.equal(Buffer.from(result.png, 'base64').subarray(1, 4).toString(), 'PNG')
  assert.equal(result.chart.type, 'bar')
  assert.deepEqual(result.chart.elements, [{ label: 'A', group: 'n', value: 1 }, { label: 'B', group: 'n', value: 2 }])
  assert.deepEqual([result.chart.title, result.chart.y_unit], ['T', 'kg'])
})

test('a frame is a table and its data', { timeout }, async () => {
  const done = await sandbox.runCode('import pandas as pd; pd.DataFrame({"a": [1, None]})')
  assert.match(done.results[0].html, /<table/)
  assert.deepEqual(done.results[0].data, { a: [1, null] })
})

test('an exception has its traceback', { timeout }, async () => {
  const done = await sandbox.runCode('1 / 0')
  assert.equal(done.error.name, 'ZeroDivisionError')
  assert.match(done.error.traceback, /1 \/ 0/)
})

test('contexts of other languages', { timeout }, async () => {
  const context = await sandbox.createCodeContext({ language: 'typescript', cwd: '/tmp' })
  assert.equal((await sandbox.runCode('const n: number = 4; n * 2', { context })).text, '8')
  assert.equal((await sandbox.runCode('process.cwd()', { context })).text, '/tmp')
  assert.ok((await sandbox.listCodeContexts()).some((c) => c.id === context.id))
  await sandbox.restartCodeContext(context)
  assert.equal((await sandbox.runCode('typeof n', { context })).text, 'undefined')
  await sandbox.removeCodeContext(context)
  await assert.rejects(sandbox.runCode('1', { context }), /not found/)
})

test('a cell that takes too long is interrupted, variables are for one cell', { timeout }, async () => {
  await assert.rejects(sandbox.runCode('import time; time.sleep(300)', { timeoutMs: 3000 }))
  const done = await sandbox.runCode('import os; os.environ["ONE"]', { envs: { ONE: 'for one' }, timeoutMs: 60_000 })
  assert.equal(done.text, 'for one')
  assert.equal((await sandbox.runCode('os.environ.get("ONE", "none")')).text, 'none')
})
