// The builder's methods that make steps or name registries, as the server sees them: what it does or says shows what it was asked.
import assert from 'node:assert/strict'
import { execFileSync } from 'node:child_process'
import { randomUUID } from 'node:crypto'
import { test } from 'node:test'
import { BuildError, Sandbox, Template } from 'e2b'
import { newSandbox, rest } from './support.js'

const timeout = 240_000
const fresh = () => `jsb-${randomUUID().slice(0, 8)}`

/** What the server says of a build that fails. */
async function failure(template) {
  const name = fresh()
  try {
    await Template.build(template, name, { cpuCount: 1, memoryMB: 512 })
  } catch (error) {
    assert.ok(error instanceof BuildError, String(error))
    return error.message
  } finally {
    await rest('DELETE', `/templates/${name}`)
  }
  assert.fail('the build did not fail')
}

test('npm and bun are steps', { timeout }, async () => {
  const base = () => Template().skipCache().fromTemplate('base')
  assert.match(await failure(base().npmInstall(['left-pad', 'x'], { g: true })), /RUN \[root\] npm install -g left-pad x failed[^]*not found/)
  assert.match(await failure(base().bunInstall('left-pad')), /RUN bun install left-pad failed[^]*not found/)
})

test('MCP servers are pulled by the gateway of the template', { timeout: 600_000 }, async () => {
  execFileSync('python3', ['-c', 'from support import gateway; gateway.template()'], { cwd: new URL('..', import.meta.url), stdio: 'ignore' })
  const said = await failure(Template().fromTemplate('mcp-gateway').addMcpServer(['no-such-server']))
  assert.match(said, /mcp-gateway pull no-such-server failed[^]*there is no server 'no-such-server'/)
})

test('dev containers are steps for a program of the template', { timeout }, async () => {
  const program = '#!/bin/sh\\necho "told: $*"; test "$1" = build || exit 9\\n'
  const base = Template().fromTemplate('base').runCmd(`printf '${program}' > /usr/local/bin/devcontainer && chmod 755 /usr/local/bin/devcontainer`, { user: 'root' })
  await Template.build(base, 'devcontainer', { cpuCount: 1, memoryMB: 512 })
  try {
    const template = Template().fromTemplate('devcontainer').betaDevContainerPrebuild('/src').betaSetDevContainerStart('/src')
    assert.match(await failure(template), /told: up --workspace-folder \/src/)
  } finally {
    await rest('DELETE', '/templates/devcontainer')
  }
})

test('the keys of clouds go with the image', { timeout }, async () => {
  const aws = Template().fromAWSRegistry('1234.dkr.ecr.eu-west-1.amazonaws.com/x:1', { accessKeyId: 'AKIDEXAMPLE', secretAccessKey: 'secret', region: 'eu-west-1' })
  assert.match(await failure(aws), /api\.ecr\.eu-west-1\.amazonaws\.com/)
  const gcp = Template().fromGCPRegistry('gcr.io/x/y:1', { serviceAccountJSON: { type: 'service_account' } })
  assert.match(await failure(gcp), /the service account has no private_key/)
})

test('a sandbox in full', { timeout }, async () => {
  const sbx = await newSandbox()
  assert.equal((await Sandbox.getFullInfo(sbx.sandboxId)).sandboxId, sbx.sandboxId)
})
