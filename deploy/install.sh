#!/bin/sh
# Puts whaled on this machine, or takes it away. Called by `make install`, `make install-share` and `make uninstall`, which set
# all variables: INSTALL_PYTHON PREFIX SYSCONFDIR UNITDIR BINDIR DESTDIR DOCS_URL EXTRAS, and WHEELS, the directory with the wheels.
# Needs no network.
#
# Every installation gets a virtual environment of its own, PREFIX/venvs/VERSION-TIME, and the units name it: a daemon that
# runs meanwhile keeps the files it was started with until it is restarted. PREFIX/venv leads to the newest one.
set -eu
umask 022
cd "$(dirname "$0")/.."

KEY_GROUP=whaled-keys
UNITS="whaled.service whaled.socket whaled-metrics.socket whaled-egress.service whaled-egress.socket"
SHARE=$PREFIX/share/systemd

say() { echo "whaled: $*"; }
refuse() { echo "whaled: $*" >&2; exit 1; }

# The unit shows the daemon no home directories, and a /tmp of its own.
must_be_visible() { # must_be_visible PATH WHAT VARIABLE
    case $1/ in
        /home/* | /root/* | /run/user/* | /tmp/* | /var/tmp/*)
            refuse "$2 lies in $1, where the service cannot see it (ProtectHome=, PrivateTmp=); set $3" ;;
        *[!A-Za-z0-9/._+-]*) refuse "$2 is $1: units cannot name a path with such characters; set $3" ;;
        /*) ;;
        *) refuse "$2 is $1: it must be a path from the root; set $3" ;;
    esac
}

check_python() {
    "$INSTALL_PYTHON" -c 'import sys; sys.exit(sys.version_info < (3, 11))' ||
        refuse "$INSTALL_PYTHON does not run or is older than Python 3.11; set INSTALL_PYTHON"
    "$INSTALL_PYTHON" -c 'import ensurepip, venv' 2>/dev/null ||
        refuse "$INSTALL_PYTHON cannot make virtual environments; on Debian: apt-get install python3-venv"
    interpreter=$("$INSTALL_PYTHON" -c 'import os, sys; print(os.path.realpath(sys.executable))')
    base=$("$INSTALL_PYTHON" -c 'import sys; print(sys.base_prefix)')
    must_be_visible "$interpreter" "Python" INSTALL_PYTHON
    must_be_visible "$base" "Python's library" INSTALL_PYTHON
}

make_venv() { # make_venv: $venv is where it will be, seen without DESTDIR
    mkdir -p "$DESTDIR$PREFIX/venvs"
    "$interpreter" -m venv "$DESTDIR$venv"
    "$DESTDIR$venv/bin/python" -m pip install --quiet --disable-pip-version-check --no-index --find-links "$WHEELS" "whaled${EXTRAS:+[$EXTRAS]}" || {
        rm -rf "$DESTDIR$venv"
        refuse "cannot install from $WHEELS; made for another Python? rm -r $WHEELS, then: make wheels INSTALL_PYTHON=$INSTALL_PYTHON"
    }
    if [ -n "$DESTDIR" ]; then
        # Scripts, and the lines that say how the environment was made, know the place where it was built.
        find "$DESTDIR$venv/bin" "$DESTDIR$venv/pyvenv.cfg" -type f -exec sed -i "s|$DESTDIR||g" {} +
        find "$DESTDIR$venv/lib" -name direct_url.json -delete
    fi
    # The daemon cannot write compiled code; tracebacks name the place where the code will be.
    "$DESTDIR$venv/bin/python" -m compileall -q ${DESTDIR:+-f -s "$DESTDIR"} "$DESTDIR$venv/lib"
}

lead_to_venv() { # in one step: there is no moment without a program
    if [ -d "$DESTDIR$PREFIX/venv" ] && [ ! -L "$DESTDIR$PREFIX/venv" ]; then
        mv "$DESTDIR$PREFIX/venv" "$DESTDIR$PREFIX/venvs/before-${venv##*/}"
    fi
    ln -sfn "venvs/${venv##*/}" "$DESTDIR$PREFIX/venv.new"
    mv -fT "$DESTDIR$PREFIX/venv.new" "$DESTDIR$PREFIX/venv"
    mkdir -p "$DESTDIR$BINDIR"
    ln -sf "$PREFIX/venv/bin/whaled" "$DESTDIR$BINDIR/whaled"
}

write_unit() { # write_unit SOURCE TARGET PROGRAM: with the paths of this installation
    extra=
    [ "$base" = /usr ] || extra=" $base/lib"
    sed -e "s|/opt/whaled/venv|$3|g" -e "s|/opt/whaled|$PREFIX|g" -e "s|/etc/whaled|$SYSCONFDIR|g" \
        -e "s|/usr/bin/python3|$interpreter|g" \
        -e "/^\(Exec\|BindReadOnly\)Paths=.*python/s|\$|$extra|" "$1" >"$DESTDIR$2.new"
    mv -f "$DESTDIR$2.new" "$DESTDIR$2"
}

write_units() {
    mkdir -p "$DESTDIR$UNITDIR" "$DESTDIR$SHARE"
    for unit in $UNITS; do write_unit "deploy/systemd/$unit" "$UNITDIR/$unit" "$venv"; done
    mkdir -p "$DESTDIR$PREFIX/root/run" "$DESTDIR$PREFIX/root/tmp" "$DESTDIR$PREFIX/root/var/tmp" # for 70-rootdir.conf
    for file in deploy/systemd/dropins/*.conf; do write_unit "$file" "$SHARE/${file##*/}" "$PREFIX/venv"; done
}

check_docs_url() {
    case $DOCS_URL in
        *[!A-Za-z0-9:/._~%+@-]*) refuse "DOCS_URL is $DOCS_URL: a URL without quotes, spaces, ? and #; runbook.md is appended" ;;
        file:///* | http://?* | https://?*) docs_url=${DOCS_URL%/} ;;
        *) refuse "DOCS_URL is $DOCS_URL: expected https://, http:// or file:/// and where the pages of docs/ are" ;;
    esac
}

write_share() { # pages, rules, dashboards: what people and other programs read
    share=$DESTDIR$PREFIX/share
    for folder in docs prometheus grafana; do rm -rf "$share/$folder"; done # pages and rules that are no more
    mkdir -p "$share"
    cp -R docs "$share/docs"
    cp -R deploy/prometheus deploy/grafana "$share"
    rm -f "$share/grafana/dashboards/.lint"
    find "$share/docs" "$share/prometheus" "$share/grafana" -type d -exec chmod 0755 {} + -o -type f -exec chmod 0644 {} +
    install -m 0644 config/whaled.example.yaml "$share/whaled.example.yaml"
    sed -i 's|(\.\./config/whaled\.example\.yaml)|(../whaled.example.yaml)|' "$share/docs/configuration.md"
    sed -i "s|file:///opt/whaled/share/docs|$docs_url|" "$share/prometheus/whaled.alerts.rules.yml"
}

configure() {
    mkdir -p "$DESTDIR$SYSCONFDIR"
    example=$DESTDIR$SYSCONFDIR/whaled.yaml
    if [ -e "$example" ]; then
        cmp -s config/whaled.example.yaml "$example" || say "kept $SYSCONFDIR/whaled.yaml as it is; the example with every key: $PREFIX/share/whaled.example.yaml"
    else
        install -m 0644 config/whaled.example.yaml "$example"
        [ "$SYSCONFDIR" = /etc/whaled ] || sed -i "s|/etc/whaled|$SYSCONFDIR|g" "$example"
    fi
    if [ -n "$DESTDIR" ]; then
        # A key in a package would be everybody's key.
        say "no key ring made under DESTDIR; on the machine itself: whaled keys generate --key-ring $SYSCONFDIR/keys.json"
        say "and for the service: groupadd --system $KEY_GROUP, before the key ring is made"
    else
        getent group "$KEY_GROUP" >/dev/null || groupadd --system "$KEY_GROUP"
        if [ ! -e "$SYSCONFDIR/keys.json" ]; then
            "$venv/bin/python" -m whaled keys generate --key-ring "$SYSCONFDIR/keys.json"
        fi
        # Earlier versions kept it for root alone (0600) and passed the daemon a copy (LoadCredential=).
        chown "root:$KEY_GROUP" "$SYSCONFDIR/keys.json"
        chmod 0640 "$SYSCONFDIR/keys.json"
    fi
}

remove_unused_venvs() { # all but the new one and those that a process was started from
    for other in "$DESTDIR$PREFIX"/venvs/*; do
        [ "$other" != "$DESTDIR$venv" ] || continue
        [ "$other" != "$DESTDIR$before" ] || continue
        # The pattern comes by standard input: on the command line grep would find itself.
        echo "${other#"$DESTDIR"}/bin/" | grep -qaF -f - /proc/[0-9]*/cmdline 2>/dev/null || rm -rf "$other"
    done
}

is_known() { # is_known UNIT: systemd runs it or will at boot
    command -v systemctl >/dev/null && { systemctl -q is-active "$1" || systemctl -q is-enabled "$1"; } 2>/dev/null
}

do_install() {
    must_be_visible "$PREFIX" PREFIX PREFIX
    must_be_visible "$SYSCONFDIR" SYSCONFDIR SYSCONFDIR
    check_docs_url
    check_python
    before=$PREFIX/$(readlink "$DESTDIR$PREFIX/venv" || true)
    version=$("$INSTALL_PYTHON" -c 'import sys, tomllib; print(tomllib.load(open("pyproject.toml", "rb"))["project"]["version"])')
    venv=$PREFIX/venvs/$version-$(date -u +%Y%m%dT%H%M%S)
    [ ! -e "$DESTDIR$venv" ] || refuse "$venv is there already; wait a second"
    make_venv
    lead_to_venv
    write_units
    write_share
    configure
    remove_unused_venvs
    [ -z "$DESTDIR" ] || return 0
    if is_known whaled.service; then
        say "upgraded to $version. The old one runs on until:"
        say "  systemctl daemon-reload && systemctl restart whaled    (clients reconnect by themselves, nobody is refused)"
        return 0
    fi
    say "installed $version. Next:"
    say "  1. say in $SYSCONFDIR/whaled.yaml where the mempool backend is (upstream.url), then: whaled check-config"
    say "     a backend on another machine needs $SHARE/20-remote-upstream.conf too"
    say "  2. systemctl daemon-reload && systemctl enable --now whaled"
    say "  3. whaled token issue --client NAME    (a token for each client)"
    say "Clients connect to 127.0.0.1:8765; elsewhere: systemctl edit whaled.socket. More: $SHARE"
    say "Pages, rules for Prometheus, dashboards for Grafana: $PREFIX/share/docs, prometheus, grafana"
}

do_share() {
    case $PREFIX in /*) ;; *) refuse "PREFIX is $PREFIX: it must be a path from the root" ;; esac
    check_docs_url
    write_share
    say "pages, rules and dashboards are in $DESTDIR$PREFIX/share; runbook links lead to $docs_url/runbook.md"
}

do_uninstall() {
    if [ -z "$DESTDIR" ]; then
        for unit in $UNITS; do
            if is_known "$unit"; then
                refuse "$unit is running or enabled, and is not stopped here. First: systemctl disable --now $UNITS"
            fi
        done
    fi
    # Drop-ins that were linked lead nowhere now; those that were copied are configuration.
    for link in "$DESTDIR$UNITDIR"/whaled.service.d/*.conf; do
        [ -L "$link" ] && case $(readlink "$link") in "$SHARE"/*) rm -f "$link" ;; esac
    done
    for unit in $UNITS; do rm -f "$DESTDIR$UNITDIR/$unit"; done
    rm -f "$DESTDIR$BINDIR/whaled" "$DESTDIR$PREFIX/venv" "$DESTDIR$PREFIX/share/whaled.example.yaml" "$DESTDIR$SHARE"/*.conf
    for folder in docs prometheus grafana; do rm -rf "$DESTDIR$PREFIX/share/$folder"; done
    rm -rf "$DESTDIR$PREFIX/venvs" "$DESTDIR$PREFIX/root"
    rmdir "$DESTDIR$SHARE" "$DESTDIR$PREFIX/share" "$DESTDIR$PREFIX" 2>/dev/null || true
    say "removed program and units, stopped nothing. Still there: $SYSCONFDIR (configuration, key ring), /var/lib/whaled (event log), the group $KEY_GROUP"
    [ -n "$DESTDIR" ] || say "next: systemctl daemon-reload"
}

case ${1:-} in
    install) do_install ;;
    share) do_share ;;
    uninstall) do_uninstall ;;
    *) refuse "install, share or uninstall?" ;;
esac
