package trust

import (
	"crypto/hmac"
	"crypto/rand"
	"crypto/sha256"
	"encoding/base64"
	"encoding/binary"
	"errors"
	"fmt"
	"strings"
	"time"
)

// A token is text: "violin1-" and, in base64 for URLs without padding,
//
//	32 bytes  SHA-256 of the authority's certificate
//	 8 bytes  the second, since 1970, at which it expires; big endian
//	16 bytes  at random
//	 n bytes  the host that it is for, 0 to 63
//	32 bytes  HMAC-SHA-256 of all before, by a key of the authority's
//
// The server keeps nothing of it: what it has sealed, it knows again.
const (
	tokenPrefix = "violin1-"
	tokenNonce  = 16
	tokenFixed  = sha256.Size + 8 + tokenNonce
	maxHost     = 63
)

// Bounds of a token's life.
const (
	MinTTL = time.Second
	MaxTTL = 30 * 24 * time.Hour
)

// ErrToken is wrapped in the error of a token that is not, or no longer, good.
var ErrToken = errors.New("the join token is not good")

// Token is a join token, taken apart. It is not known to be good.
type Token struct {
	Authority [sha256.Size]byte
	Expires   time.Time
	Host      string // that alone may join with it; empty for any
	nonce     [tokenNonce]byte
	seal      [sha256.Size]byte
}

// body is what the seal is of.
func (t *Token) body() []byte {
	b := append([]byte{}, t.Authority[:]...)
	b = binary.BigEndian.AppendUint64(b, uint64(t.Expires.Unix()))
	b = append(b, t.nonce[:]...)
	return append(b, t.Host...)
}

func (t *Token) String() string {
	return tokenPrefix + base64.RawURLEncoding.EncodeToString(append(t.body(), t.seal[:]...))
}

// ParseToken reads what [Token.String] has written, and nothing else. After an error
// the token is nil.
func ParseToken(s string) (*Token, error) {
	text, ok := strings.CutPrefix(s, tokenPrefix)
	if !ok {
		return nil, fmt.Errorf("%w: it does not begin with %q, as those that `violin token create` prints", ErrToken, tokenPrefix)
	}
	b, err := base64.RawURLEncoding.Strict().DecodeString(text)
	if err != nil || strings.ContainsAny(text, "\r\n") { // which the decoder skips
		return nil, fmt.Errorf("%w: a part of it is missing or wrong", ErrToken)
	}
	n := len(b) - tokenFixed - sha256.Size
	if n < 0 || n > maxHost {
		return nil, fmt.Errorf("%w: it is %d bytes, want %d to %d", ErrToken, len(b), tokenFixed+sha256.Size, tokenFixed+sha256.Size+maxHost)
	}
	t := &Token{Host: string(b[tokenFixed : tokenFixed+n])}
	copy(t.Authority[:], b)
	seconds := binary.BigEndian.Uint64(b[sha256.Size:])
	if seconds > 1<<40 {
		return nil, fmt.Errorf("%w: it would expire in 30,000 years", ErrToken)
	}
	t.Expires = time.Unix(int64(seconds), 0)
	copy(t.nonce[:], b[sha256.Size+8:])
	copy(t.seal[:], b[tokenFixed+n:])
	if t.Host != "" {
		if err := CheckName(t.Host); err != nil {
			return nil, fmt.Errorf("%w: %w", ErrToken, err)
		}
	}
	return t, nil
}

// NewToken makes a token for a host, or for any if that is empty.
func (a *Authority) NewToken(host string, ttl time.Duration) (*Token, error) {
	if ttl < MinTTL || ttl > MaxTTL {
		return nil, fmt.Errorf("a token for %s: it may be good for %s to %s", ttl, MinTTL, MaxTTL)
	}
	if host != "" {
		if err := CheckName(host); err != nil {
			return nil, err
		}
	}
	t := &Token{Authority: sha256.Sum256(a.cert.Raw), Expires: time.Now().Add(ttl).Truncate(time.Second), Host: host}
	if _, err := rand.Read(t.nonce[:]); err != nil {
		return nil, err
	}
	copy(t.seal[:], a.seal(t))
	return t, nil
}

func (a *Authority) seal(t *Token) []byte {
	m := hmac.New(sha256.New, a.token)
	m.Write(t.body())
	return m.Sum(nil)
}

func (a *Authority) checkToken(t *Token, host string, now time.Time) error {
	switch {
	case !hmac.Equal(t.seal[:], a.seal(t)):
		return fmt.Errorf("%w: this server has not made it", ErrToken)
	case now.After(t.Expires):
		return fmt.Errorf("%w: it expired at %s; `violin token create` makes another", ErrToken, t.Expires.UTC().Format(time.RFC3339))
	case t.Host != "" && t.Host != host:
		return fmt.Errorf("%w: it is for host %s, not for %s", ErrToken, t.Host, host)
	}
	return nil
}
