package integration

import (
	"bytes"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/pem"
	"errors"
	"fmt"
	"io/fs"
	"math/big"
	"net"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"scoria/driver/control"
	"scoria/integration/bed"
)

// authority is a CA.
type authority struct {
	cert *x509.Certificate
	key  *ecdsa.PrivateKey
	der  []byte
}

func (e *env) newAuthority(name string) *authority {
	e.Helper()
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	e.must(err)
	a := &authority{key: key, cert: &x509.Certificate{
		SerialNumber: big.NewInt(1), Subject: pkix.Name{CommonName: name},
		NotBefore: time.Now().Add(-time.Hour), NotAfter: time.Now().Add(24 * time.Hour),
		IsCA: true, BasicConstraintsValid: true, KeyUsage: x509.KeyUsageCertSign,
	}}
	a.der, err = x509.CreateCertificate(rand.Reader, a.cert, a.cert, &key.PublicKey, key)
	e.must(err)
	return a
}

// credentials are the files of one side of mutual TLS.
type credentials struct{ cert, key, ca string }

func credentialsIn(dir string) credentials {
	return credentials{cert: filepath.Join(dir, "cert.pem"), key: filepath.Join(dir, "key.pem"), ca: filepath.Join(dir, "ca.pem")}
}

// issue makes a certificate of a for loopback, in the files of c.
func (e *env) issue(a *authority, c credentials) {
	e.Helper()
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	e.must(err)
	cert := &x509.Certificate{
		SerialNumber: big.NewInt(time.Now().UnixNano()), Subject: pkix.Name{CommonName: "scoria"},
		NotBefore: a.cert.NotBefore, NotAfter: a.cert.NotAfter, IPAddresses: []net.IP{net.IPv4(127, 0, 0, 1)},
		KeyUsage: x509.KeyUsageDigitalSignature, ExtKeyUsage: []x509.ExtKeyUsage{x509.ExtKeyUsageServerAuth, x509.ExtKeyUsageClientAuth},
	}
	der, err := x509.CreateCertificate(rand.Reader, cert, a.cert, &key.PublicKey, a.key)
	e.must(err)
	keyDER, err := x509.MarshalECPrivateKey(key)
	e.must(err)
	e.writePEM(c.cert, "CERTIFICATE", der)
	e.writePEM(c.key, "EC PRIVATE KEY", keyDER)
	e.writePEM(c.ca, "CERTIFICATE", a.der)
}

func (e *env) writePEM(name, kind string, der []byte) {
	e.Helper()
	e.must(os.WriteFile(name, pem.EncodeToMemory(&pem.Block{Type: kind, Bytes: der}), 0o600))
}

// secureStore is a daemon with three storage daemons that it speaks to by mutual TLS,
// and master keys.
type secureStore struct {
	*env
	ours, strangers  *authority
	client           credentials // of scoriad, which reads them at each connection
	masterKeys, args []string    // args: of the storage daemons
	asds             []*asdProcess
}

// prepareSecure starts the processes; the storage daemons are not added yet.
func prepareSecure(t *testing.T) *secureStore {
	t.Helper()
	s := &secureStore{env: prepare(t)}
	s.ours, s.strangers = s.newAuthority("ours"), s.newAuthority("strangers")
	s.client = credentialsIn(scratch(t, false))
	server := credentialsIn(scratch(t, false))
	s.issue(s.ours, s.client)
	s.issue(s.ours, server)
	for i := range 2 {
		s.masterKeys = append(s.masterKeys, filepath.Join(filepath.Dir(s.client.key), fmt.Sprint("master-keys-", i)))
		s.must(os.WriteFile(s.masterKeys[i], []byte(strings.Repeat(fmt.Sprintf("%02x", 17+i), 32)+"\n"), 0o600))
	}
	s.Config = filepath.Join(s.DataDir, "scoria.toml")
	// Without local copies every read is one of the object store, and without a default
	// pool in that, no storage daemon is made in the data directory.
	s.must(os.WriteFile(s.Config, fmt.Appendf(nil, "data_dir = %q\nrun_dir = %q\n[cache]\nlocal = \"0\"\nread = \"0\"\n[pool]\nstore = \"directory\"\n"+
		"[backend]\nmaster_keys = %q\ntls_cert = %q\ntls_key = %q\ntls_ca = %q\n",
		s.DataDir, s.RunDir, s.masterKeys[0], s.client.cert, s.client.key, s.client.ca), 0o600))
	s.args = []string{"--tls-cert", server.cert, "--tls-key", server.key, "--tls-ca", server.ca}
	for i := range 3 {
		s.asds = append(s.asds, s.startASD(fmt.Sprintf("asd%d", i), s.args...))
	}
	s.must(s.Start(s.ctx))
	return s
}

// marker is in every block of the volume, so that it would be found on the disks if
// it were stored as it is.
const marker = "this is not to be read on the disks of the storage daemons"

// markedFile is a file of random bytes, so many MiB, with the marker in every 4 KiB.
func (s *secureStore) markedFile(mib int) string {
	s.Helper()
	b := make([]byte, mib<<20)
	_, _ = rand.Read(b)
	for off := 0; off < len(b); off += 4096 {
		copy(b[off+100:], marker)
	}
	name := filepath.Join(scratch(s.T, false), "marked")
	s.must(os.WriteFile(name, b, 0o600))
	return name
}

// unreadable fails the test if a storage daemon's files have the marker.
func (s *secureStore) unreadable() {
	s.Helper()
	read := 0
	for _, a := range s.asds {
		s.must(filepath.WalkDir(a.dir, func(name string, d fs.DirEntry, err error) error {
			if err != nil || !d.Type().IsRegular() {
				return ignoreGone(err)
			}
			b, err := os.ReadFile(name)
			if bytes.Contains(b, []byte(marker)) {
				s.Errorf("%s has what was to be encrypted", name)
			}
			read += len(b)
			return ignoreGone(err)
		}))
	}
	if read < 8<<20 {
		s.Errorf("the storage daemons' files have %d bytes: the volume is elsewhere", read)
	}
}

// ignoreGone: a storage daemon deletes files meanwhile.
func ignoreGone(err error) error {
	if errors.Is(err, fs.ErrNotExist) {
		return nil
	}
	return err
}

// TestP10EncryptedVolumeOverTLS: scoriad and storage daemons that don't know each
// other's CA have nothing to do with each other, and say why. Once they do, an encrypted volume
// over three of them is written and read while one is killed, and none of it can be read
// on their disks. With the registry lost, it is rebuilt from them over TLS, with the
// volume's key: not without the CA or the master key, which leaves everything as it
// is, but then with them.
func TestP10EncryptedVolumeOverTLS(t *testing.T) {
	s := prepareSecure(t)
	add := func() error { _, err := s.CLI(s.ctx, "asd", "add", s.asds[0].address); return err }
	s.issue(s.strangers, s.client)
	s.refused(add(), s.asds[0].address, "certificate signed by unknown authority")
	s.writePEM(s.client.ca, "CERTIFICATE", s.ours.der) // knows them, and isn't known
	// The alert that says why may be overtaken by the end of the connection.
	s.refused(add(), s.asds[0].address, "ASD is unavailable")
	s.poll("the storage daemon's log to say why", func() (bool, error) {
		return strings.Contains(bed.Tail(filepath.Join(s.DataDir, "asd0.log"), 20), "tls: client didn't provide a certificate"), nil
	})
	s.issue(s.ours, s.client)
	var ids []string
	for _, a := range s.asds {
		ids = append(ids, s.addASD(a))
	}

	s.ok(s.CLI(s.ctx, "preset", "create", "safe", "--policy", "2,1,2,1", "--fragment-size", "256K", "--encryption", "aes-256-gcm"))
	s.ok(s.CLI(s.ctx, "pool", "create", "safe", "--preset", "safe", "--sco-size", "1M"))
	s.ok(s.CLI(s.ctx, "volume", "create", "safe/v", "--size", "64M"))
	uri := "nbd+unix:///safe/v?socket=" + s.NBDSocket()
	first, second := s.markedFile(16), s.markedFile(32)
	s.run("nbdcopy", "--flush", first, uri)
	s.poll("objects to be stored", func() (bool, error) { n, objects := s.safety(); return objects > 8 && n == 1, nil })
	s.must(s.asds[0].Kill())
	s.run("nbdcopy", "--flush", second, uri)
	s.same(second, uri)
	s.ok(s.CLI(s.ctx, "snapshot", "create", "safe/v@s"))
	s.runASD(s.asds[0], s.args...)
	s.poll("the storage daemon to be taken back", func() (bool, error) {
		var a control.ASD
		err := s.CLIJSON(s.ctx, &a, "asd", "show", ids[0])
		return a.Up, err
	})
	s.ok(s.CLI(s.ctx, "backend", "repair", "start"))
	s.poll("safety to be full again", func() (bool, error) { n, objects := s.safety(); return n == 1 && objects > 20, nil })
	s.unreadable()
	var before, after control.Volume
	s.must(s.CLIJSON(s.ctx, &before, "volume", "show", "safe/v"))
	s.must(s.Stop(s.ctx))

	s.loseRegistry()
	s.restart()
	s.must(s.CLIJSON(s.ctx, &after, "volume", "show", "safe/v"))
	if after.ID != before.ID || after.Size != before.Size || after.Serial != before.Serial {
		t.Fatalf("volume %+v, was %+v", after, before)
	}
	s.same(second, uri)
	s.same(second, "nbd+unix:///safe/v@s?socket="+s.NBDSocket())
	// Of what was acknowledged by two of them the third has its part a moment later.
	s.poll("the end of the log to be safe", func() (bool, error) { n, _ := s.safety(); return n == 1, nil })
	s.must(s.asds[1].Kill())
	s.same(second, uri)
	s.run("nbdcopy", "--flush", first, uri)
	s.same(first, uri)
	if strings.Contains(s.metrics(), "scoria_objects_total{name=\"reads\"} 0\n") {
		t.Error("nothing was read from the object store: the test reads elsewhere")
	}
}

// loseRegistry removes the registry and rebuilds it, after all attempts that are to
// be refused.
func (s *secureStore) loseRegistry() {
	s.Helper()
	file := filepath.Join(s.DataDir, "registry.db")
	s.must(os.Remove(file))
	rebuild := func(args ...string) (string, error) {
		args = append([]string{"backend", "rebuild-registry"}, args...)
		for _, a := range s.asds {
			args = append(args, "--asd", a.address)
		}
		return s.CLI(s.ctx, args...)
	}
	refused := func(err error, words ...string) {
		s.Helper()
		s.refused(err, words...)
		if left, err := filepath.Glob(file + "*"); err != nil || len(left) > 0 {
			s.Fatalf("a refusal leaves %v, %v", left, err)
		}
	}
	_, err := rebuild("--data-dir", s.DataDir) // plain TCP
	refused(err, "no storage daemon could be read", s.asds[0].address)
	s.issue(s.strangers, s.client)
	_, err = rebuild("--config", s.Config)
	refused(err, "no storage daemon could be read", s.asds[2].address, "certificate signed by unknown authority")
	s.issue(s.ours, s.client)
	s.must(os.Rename(s.masterKeys[0], s.masterKeys[0]+".away"))
	_, err = rebuild("--config", s.Config)
	refused(err, "master_keys", s.masterKeys[0], "no such file")
	s.must(os.Rename(s.masterKeys[0]+".away", s.masterKeys[0]))
	_, err = rebuild("--config", s.Config, "--master-keys", s.masterKeys[1])
	refused(err, "1 volumes are encrypted", "wrapped by master key", "--master-keys", "--force")
	out, err := rebuild("--config", s.Config)
	s.must(err)
	if !strings.Contains(out, "safe/v") || strings.Contains(out, "problem") {
		s.Fatalf("rebuilt:\n%s", out)
	}
}
