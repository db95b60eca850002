// The builder's methods that make steps or name registries, as the server sees them: what it does or says shows what it was asked.
import assert from 'node:assert/strict'
import { execFileSync } from 'node:child_process'
import { randomUUID } from 'node:crypto'
import { mkdtempSync, rmSync, writeFileSync } from 'node:fs'
import { tmpdir } from 'node:os'
import { join } from 'node:path'
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
  execFileSync('python3', ['-m', 'support.gateway'], { cwd: new URL('..', import.meta.url), stdio: 'ignore' })
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

test('files, clones and a ready command', { timeout }, async () => {
  const folder = mkdtempSync(join(tmpdir(), 'nidus-js-'))
  const name = fresh()
  try {
    for (const file of ['one', 'two']) writeFileSync(join(folder, file), file)
    const template = Template({ fileContextPath: folder }).fromTemplate('base').setUser('root').setWorkdir('/srv')
      .copy('one', '/srv/one').copyItems([{ src: 'two', dest: '/srv/two' }])
      .runCmd('git init -q r && git -C r -c user.name=a -c user.email=a@b commit -q --allow-empty -m said')
      .gitClone('/srv/r', '/srv/clone').setReadyCmd('test -d /srv/clone')
    await Template.build(template, name, { cpuCount: 1, memoryMB: 512 })
    const sbx = await Sandbox.create(name, { timeoutMs: 120_000 })
    const { stdout } = await sbx.commands.run('cat /srv/one /srv/two; git -C /srv/clone log --format=%s', { user: 'root' })
    await sbx.kill()
    assert.equal(stdout, 'onetwosaid\n')
  } finally {
    rmSync(folder, { recursive: true })
    await rest('DELETE', `/templates/${name}`)
  }
})

test('packages of Debian and PyPI are steps', { timeout }, async () => {
  const base = () => Template().skipCache().fromTemplate('base')
  assert.match(await failure(base().pipInstall(['/no/such.whl'])), /pip install[^]*\/no\/such\.whl/)
  assert.match(await failure(base().runCmd('rm -f /etc/apt/sources.list.d/* /etc/apt/sources.list', { user: 'root' }).aptInstall(['no-such-package'])), /Unable to locate package no-such-package/)
})

test('images by their names', () => {
  for (const [template, image] of [
    [Template().fromDebianImage('bookworm'), 'debian:bookworm'], [Template().fromUbuntuImage('24.04'), 'ubuntu:24.04'],
    [Template().fromFedoraImage('44'), 'fedora:44'], [Template().fromAlpineImage('3.24'), 'alpine:3.24'],
    [Template().fromPythonImage('3.12'), 'python:3.12'], [Template().skipCache().fromArchImage('base'), 'archlinux:base'],
    [Template().fromBunImage('1.2'), 'bun:1.2'], [Template().fromNodeImage('22'), 'node:22'], [Template().fromBaseImage(), 'e2bdev/base'],
    [Template().fromDockerfile('FROM debian:bookworm\nRUN true'), 'debian:bookworm'],
  ]) assert.ok(`${Template.toDockerfile(template)}\n`.includes(`${image}\n`), image)
})

test('a sandbox in full', { timeout }, async () => {
  const sbx = await newSandbox()
  assert.equal((await Sandbox.getFullInfo(sbx.sandboxId)).sandboxId, sbx.sandboxId)
})
